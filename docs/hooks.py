"""Pages that are written when the site is built: every solver, every setting, and files of the top folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]


def on_files(files: Files, config: Any) -> Files:
    """Add them."""
    pages = {"reference/solvers.md": _solvers(), "reference/settings.md": _settings()}
    for name in ("CHANGELOG.md", "CONTRIBUTING.md"):
        pages[name.lower()] = (ROOT / name).read_text().replace("](docs/", "](").replace("](CHANGELOG", "](changelog")
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def _solvers() -> str:
    """What `solvers.describe` says of each."""
    import solvers

    out = ["# Every solver\n", "Options go in brackets, `greedy_ls[window=20]`; the same on every command line.\n"]
    for name in solvers.available_solvers():
        found = solvers.describe(name)
        out.append(f"## {name}\n\n{_sentence(found.summary)}\n")
        facts = {
            "source": found.reference,
            "can": ", ".join(found.capabilities),
            "curvatures": ", ".join(found.curvatures) or "all",
            "budgets": ", ".join(found.budgets) or "all",
            "looks at": ", ".join(found.needs),
            "most weights": f"{found.max_weights:,}" if found.max_weights else "",
            "needs": ", ".join(found.requires),
        }
        out += [f"- {key}: {value}" for key, value in facts.items() if value]
        if found.options:
            out.append("\n| option | default | |\n|---|---|---|")
            out += [f"| `{o.name}` | `{o.default}` | {_cell(o.help)} |" for o in found.options]
        out.append("")
    return "\n".join(out)


def _settings() -> str:
    """What `cbs_opt.cli.schema` reads off the signature of `prune`."""
    from cbs_opt.cli.schema import settings

    out = [
        "# Settings of `cbs-opt prune`\n",
        "The arguments of `cbs_opt.prune`, as flags; in `prune.toml` a group is a table. Read off the signature.\n",
        "| flag | default | |\n|---|---|---|",
    ]
    out += [f"| `--{s.key.replace('_', '-')}` | `{s.default}` | {_cell(s.help)} |" for s in settings()]
    return "\n".join(out) + "\n"


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."

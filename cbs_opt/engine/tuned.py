"""A network pruned at one go and fine-tuned afterwards, and its journal.

The journal is that of `cbs_opt.engine.journal` without stages: what is run, the pruned network in ``pruned/``
(`PruneResult.save`), and the state of the training. What is taken up again does not prune again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from cbs_opt.engine.choice import Choice
from cbs_opt.engine.journal import Journal
from cbs_opt.engine.settings import plain
from cbs_opt.engine.training_file import TrainingFile
from cbs_opt.engine.tuning import Tuning
from cbs_opt.engine.workspace import OpenNetwork
from cbs_opt.measure.gradients import Progress
from cbs_opt.network.identity import copy_network
from cbs_opt.network.masks import remove_masks
from cbs_opt.report.folders import HEADER
from cbs_opt.report.norms import norm_of
from cbs_opt.report.result import PruneResult, load
from cbs_opt.report.warnings import fine_tune_warnings, without_collapse
from solvers.files import holding

#: Folder of a journal that gets the network once it is pruned.
_PRUNED = "pruned"


def fine_tuned(
    network: OpenNetwork,
    choice: Choice,
    make: Callable[[Choice], PruneResult],
    journal: Path | str | None = None,
    progress: Progress | None = None,
) -> PruneResult:
    """What `make` prunes at one go, trained afterwards where the choice says so.

    Parameters
    ----------
    network : OpenNetwork
        As it was given.
    choice : Choice
    make : callable
        Prunes it by the choice it is handed, which trains no more; may give the network away.
    journal : path, optional
        Folder that gets the pruned network, and the state of the training.
    progress : callable, optional
        Called with (steps done, steps in all).
    """
    if choice.finetune is None:
        return make(choice)
    tuning = Tuning(network, choice.finetune)
    with holding(journal) if journal is not None else nullcontext():
        kept = None
        if journal is not None:
            book = Journal(journal, tuning.fingerprint(choice))
            book.begin()
            kept = TrainingFile(book.folder, 1)
        bare = replace(choice, finetune=None)
        if kept is None:
            result, resumed = make(bare), False
        else:
            result, resumed = _pruned(network, kept.folder / _PRUNED, lambda: make(bare))
        return _trained(tuning, result, kept, progress, resumed)


def _pruned(network: OpenNetwork, folder: Path, make: Callable[[], PruneResult]) -> tuple[PruneResult, bool]:
    """The pruned network of a journal, and whether it was there already."""
    if (folder / HEADER).exists():
        return load(folder, copy_network(network.model)), True
    result = make()
    result.save(folder)
    return result, False


def _trained(
    tuning: Tuning, result: PruneResult, kept: TrainingFile | None, progress: Progress | None, resumed: bool
) -> PruneResult:
    """Train the network of a result, in place, and say so."""
    network, pruned = tuning.network, result.pruned
    model = remove_masks(result.model).eval()
    done = tuning.train(model, pruned, kept=kept, progress=progress)
    record = tuning.record([done])
    loss = network.meter.of_network(model)
    constant = network.meter.is_constant(model)
    weights = network.layers.parameters(model)
    rows = tuple(
        replace(row, norm_after=norm_of(weight)) for row, weight in zip(result.report.layers, weights, strict=True)
    )
    masks = network.finish(model, pruned)
    note = ("the pruned network was read from the journal and not pruned again",) if resumed else ()
    before = result.report
    report = replace(
        before,
        layers=rows,
        loss_pruned=loss,
        loss_untuned=before.loss_pruned,
        finetune=record,
        warnings=(
            *(before.warnings if constant else without_collapse(before.warnings)),
            *fine_tune_warnings(record),
        ),
        repairs=(*note, *before.repairs, *record.notes),
    )
    return replace(
        result,
        model=model,
        masks=masks,
        report=report,
        settings={**result.settings, "finetune": plain(tuning.options)},
    )

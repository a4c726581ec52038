"""``python -m experiments.tables``: the literature's table beside ours, staged pruning without training."""

from cbs_opt.cli.shell import run_app
from experiments.commands.tables import app

if __name__ == "__main__":
    run_app(app)

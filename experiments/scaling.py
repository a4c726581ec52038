"""``python -m experiments.scaling``: how the time of layer-wise pruning grows with tokens, width and layers."""

from cbs_opt.cli.shell import run_app
from experiments.commands.scaling import app

if __name__ == "__main__":
    run_app(app)

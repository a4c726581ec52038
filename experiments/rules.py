"""``python -m experiments.rules``: every published rule as one combination of curvature, budget and solver."""

from cbs_opt.cli.shell import run_app
from experiments.commands.rules import app

if __name__ == "__main__":
    run_app(app)

"""``python -m experiments.compare``: how good is a solver, really?."""

from cbs_opt.cli.shell import run_app
from experiments.commands.compare import app

if __name__ == "__main__":
    run_app(app)

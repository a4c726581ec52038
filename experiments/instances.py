"""``python -m experiments.instances``: the instances of the package: listed, exported, cut anew, proven."""

from cbs_opt.cli.shell import run_app
from experiments.commands.instances import app

if __name__ == "__main__":
    run_app(app)

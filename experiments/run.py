"""``python -m experiments.run``: prune the network of an experiment and report accuracies."""

from cbs_opt.cli.shell import run_app
from experiments.commands.run import app

if __name__ == "__main__":
    run_app(app)

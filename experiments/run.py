"""``python -m experiments.run``: prune the network of an experiment and report accuracies."""

from experiments.commands.run import app
from experiments.commands.shell import run_app

if __name__ == "__main__":
    run_app(app)

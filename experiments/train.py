"""``python -m experiments.train``: train the network of an experiment."""

from cbs_opt.cli.shell import run_app
from experiments.commands.train import app

if __name__ == "__main__":
    run_app(app)

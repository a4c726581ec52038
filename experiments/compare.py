"""``python -m experiments.compare``: how good is a solver, really?."""

from experiments.commands.compare import app
from experiments.commands.shell import run_app

if __name__ == "__main__":
    run_app(app)

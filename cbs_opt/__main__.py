"""``python -m cbs_opt``: the command ``cbs-opt``."""

from cbs_opt.cli.main import main

if __name__ == "__main__":
    main()

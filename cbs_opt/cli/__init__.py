"""The command line, ``cbs-opt``: one command per file."""

"""The papers' models and data sets, and the commands which run, compare and tabulate."""

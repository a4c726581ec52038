"""Pruned networks for elsewhere: one file per format."""

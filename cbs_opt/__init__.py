"""Prune networks with the combinatorial brain surgeon."""

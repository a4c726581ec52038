"""Heuristics for the joint objective: the kept weights are re-optimised while choosing."""

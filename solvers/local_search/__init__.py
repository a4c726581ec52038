"""Heuristics that swap removed and kept weights."""

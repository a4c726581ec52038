"""Backends that prove optimality, given the time."""

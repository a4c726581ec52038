"""Solvers that wrap solvers."""

"""Carrying out: sweeps over one network, solves of small problems, paths of stages; rows of results as they come."""

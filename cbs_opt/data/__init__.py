"""Calibration data, how a network is called on them, and its loss."""

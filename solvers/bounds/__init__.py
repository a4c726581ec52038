"""Certified lower bounds."""

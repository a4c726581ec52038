"""Moves between masks, each written once: swap tables, elimination, kicks."""

"""Which weights of a network may be pruned, and the masks that keep them at zero."""

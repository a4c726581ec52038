"""What a change of the weights costs: gradients, the empirical Fisher, its blocks."""

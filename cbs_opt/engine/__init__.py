"""What is done to a network, in order: plans, steps, refits, the journal."""

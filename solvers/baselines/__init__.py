"""Selection rules that look at each weight once."""

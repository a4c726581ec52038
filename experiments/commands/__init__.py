"""The commands: their options, in words and in types, and what is done with them."""

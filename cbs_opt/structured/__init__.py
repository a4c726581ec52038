"""Structure that is really gone: channels and heads taken out of the modules."""

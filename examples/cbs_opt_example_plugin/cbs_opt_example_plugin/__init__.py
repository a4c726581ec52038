"""An example of a third-party solver for cbs-opt."""

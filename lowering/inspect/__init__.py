"""Tools that only look: what Inductor generated, compiled and run without a GPU."""

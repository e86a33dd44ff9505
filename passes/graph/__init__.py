"""The graph as it came: operations by one name each, axes, provenance, facts."""

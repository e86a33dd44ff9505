"""Carrying decisions out: each module is one rewrite of the graph."""

"""The LayerNorms of a graph: calls, chains written by hand, and those inside other operators."""

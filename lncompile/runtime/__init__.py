"""What works at each call of a compiled graph: the centered weights, and the look at what they were made of."""

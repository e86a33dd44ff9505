"""A server of one transformers model whose requests are answered by two compilers, tested against each other."""

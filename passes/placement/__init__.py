"""What is centered where: the streams, what each choice costs, and the best choice."""

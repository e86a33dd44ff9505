"""The latency suite: workloads, the candidates that run them, how they are measured, and how the result is shown."""

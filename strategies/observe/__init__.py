"""What an operator sees of a server or a node: Prometheus metrics and structured logs, and never data."""

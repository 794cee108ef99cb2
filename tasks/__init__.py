"""What is learned: data, partitions, heads, losses and metrics."""

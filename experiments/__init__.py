"""Training runs of `tempbalance`: models, data, tasks, and the command that joins them."""

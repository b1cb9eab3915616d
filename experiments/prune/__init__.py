"""Pruning of causal language models: one run, the table of them, and its picture."""

"""Benchmarks: every speed that the documentation claims, measured again by one command."""

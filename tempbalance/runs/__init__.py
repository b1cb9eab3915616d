"""Runs: what a run leaves on disk, written, read and drawn.

Stands on measure/ and plots/; cli/ and integrations/ use it. A newcomer adds a column or a picture
of a run here.
"""

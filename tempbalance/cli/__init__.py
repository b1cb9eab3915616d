"""Cli: the command ``tempbalance``."""

from tempbalance.cli.command import main as main

"""Integrations: a framework each, imported only by who uses that framework.

Stands on optim/ and runs/; nothing imports it. A newcomer adds a framework as a file of its own.
"""

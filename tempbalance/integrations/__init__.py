"""Adapters for training frameworks; each is imported only where it is used."""

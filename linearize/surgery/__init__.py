"""Operate on a model: layers that may stand in it, forwards rewritten, maps read from it."""

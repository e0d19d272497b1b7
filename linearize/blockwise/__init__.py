"""Compressing a model block by block: the weights of one block and what is known of it are in memory at a time."""

"""Change a model: the layers that it may contain, rewritten forwards, maps read from it."""

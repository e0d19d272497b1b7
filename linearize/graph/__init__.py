"""Read a model: from its forward pass to a list of activation sites."""

"""Pure functions on tensors: the mathematics of folding affine maps into one another."""

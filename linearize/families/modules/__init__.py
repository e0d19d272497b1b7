"""A whole module, such as attention or a residual block, becomes one linear map."""

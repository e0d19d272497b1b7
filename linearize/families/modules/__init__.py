"""The family "modules": one linear map replaces a whole module, such as attention or a residual block."""

"""A suite of measurements: every model in every cell of a matrix, on one device, to be merged with those of others."""

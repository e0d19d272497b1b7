"""A chain of sites between two maps becomes one dense convolution."""

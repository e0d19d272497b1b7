"""The family "blocks": one dense convolution replaces a chain of sites between two linear maps."""

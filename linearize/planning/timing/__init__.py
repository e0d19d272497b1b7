"""Measured latencies of options: layers beside each other, shares of time inside the model, and the table of ratios."""

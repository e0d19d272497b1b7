"""Channels of a site go, and least squares refits the maps that read the others, beside a linear skip or without."""

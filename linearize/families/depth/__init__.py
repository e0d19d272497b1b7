"""Layers go: a run of residual blocks becomes nothing, or one map that is merged into the projection before it."""

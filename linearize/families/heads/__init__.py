"""Heads of attention go, queries alone or with their group of keys and values, and the projection makes up for them."""

"""Attention becomes one linear map or nothing, in models that generate, too: its keys and values go from the cache."""

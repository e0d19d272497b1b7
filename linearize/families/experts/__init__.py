"""Experts of a mixture go, or become narrower, each by channels of its own."""

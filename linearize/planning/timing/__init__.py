"""Measured latencies of options."""

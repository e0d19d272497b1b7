"""Models that generate, as they are served: memory, time to the first token, and time for each token after it."""

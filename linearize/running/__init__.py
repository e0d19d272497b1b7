"""Run models over batches, for whatever purpose, and leave no trace."""

"""Run models over batches, for all purposes, without changing them."""

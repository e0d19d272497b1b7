"""One model in one file: its tensors, its description, and how it is restored."""

"""One model in one file: the tensors, what the file says about itself, and how they are put back."""

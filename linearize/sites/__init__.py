"""What was found in a model, as plain data, and the record of it that a model keeps."""

"""The sites of a model as plain data, and the record that a converted model keeps."""

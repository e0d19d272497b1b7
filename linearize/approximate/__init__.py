"""What is not exact: least squares on calibration data, and which channels to remove. Exact steps live elsewhere."""

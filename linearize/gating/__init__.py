"""The gate on an activation, its arithmetic, and groups of sites that share maps."""

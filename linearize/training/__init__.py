"""What fine-tuning is made of: losses, a run and its state, channels that compete."""

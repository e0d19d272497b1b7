"""The parts of fine-tuning: losses, priors, schedules, the state of a run."""

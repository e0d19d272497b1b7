"""Channels go to their own line, in place: budgets in nonlinear units."""

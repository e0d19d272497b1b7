"""The family "lines": channels follow their fitted line, for budgets in nonlinear units."""

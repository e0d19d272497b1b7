"""The family "channels": channels are removed and the next layer is refitted, with or without a linear skip."""

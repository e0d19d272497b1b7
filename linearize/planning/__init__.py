"""From a request to a plan: options for each site, their costs and losses, and the best choice within a budget."""

"""What could happen to each site, what that costs and loses, and the best choice within a budget."""

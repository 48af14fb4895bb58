"""Model hub: what a model id names, and how its files come onto this host."""

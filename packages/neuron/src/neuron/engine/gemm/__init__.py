"""Products: ways to multiply by a linear layer's matrix."""

"""Tensor parallelism: the group of ranks that share a model, and which slice of a tensor each of them holds."""

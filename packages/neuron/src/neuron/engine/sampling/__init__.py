"""Sampling: from logits to one token per sequence."""

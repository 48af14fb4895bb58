"""The scheduler and what it knows of a sequence: pure Python, no tensors."""

"""Memory: whether a model fits, what the models that are here were promised, and copies of weights in host memory."""

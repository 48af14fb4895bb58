"""One engine step: batch, forward pass, sampling, and the pipeline of steps in flight."""

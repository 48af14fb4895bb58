"""Attention over the paged KV cache: the layer, its interface and the backends of CPU and CUDA."""

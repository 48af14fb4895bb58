"""Triton kernels of attention, rotary embedding and KV writes."""

"""The paged KV cache: tensors, page ownership, prefix reuse."""

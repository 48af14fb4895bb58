"""Admission: who may use a model now, who waits, who is refused, and what its KV cache can hold."""

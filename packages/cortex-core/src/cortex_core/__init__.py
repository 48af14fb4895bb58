"""Vocabulary of gateway and neuron: the internal request, the event stream, the API dialects, fleet types.

Pure functions and frozen structs; no I/O, no web framework, no torch.
"""

"""Carry one request to a neuron and its answer back, byte for byte."""

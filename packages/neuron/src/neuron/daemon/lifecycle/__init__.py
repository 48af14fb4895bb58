"""Lifecycle of models: loads, states, progress and unloads."""

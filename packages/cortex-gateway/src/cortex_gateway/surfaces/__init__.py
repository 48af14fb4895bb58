"""Surfaces: the inference routes of each API, and the two fields of a body that all of them read."""

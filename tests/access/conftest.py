"""Gateways in front of fake neurons."""

from __future__ import annotations

from tests.cortex_gateway.conftest import neuron, second, stack, start

__all__ = ["neuron", "second", "stack", "start"]

"""Small structures: a small vocabulary takes every path of a large one."""

from __future__ import annotations

import pytest
from neuron.engine.kernels.sampling import sampling


@pytest.fixture(autouse=True)
def small_structures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small groups, tiles and candidate lists, so that a small vocabulary takes every path of a large one."""
    monkeypatch.setattr(sampling, "_TILE", 256)
    monkeypatch.setattr(sampling, "_MIN_GROUP", 16)
    monkeypatch.setattr(sampling, "_CAPACITY", 128)
    monkeypatch.setattr(sampling, "_FIRST_CANDIDATES", 32)
    monkeypatch.setattr(sampling, "_CHUNK", 256)
    monkeypatch.setattr(sampling, "_ENTRIES", 32)

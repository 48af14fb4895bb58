"""Short segments: small products are cut as large ones are."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from neuron.engine.kernels.gemm import linear_tiling


@pytest.fixture(autouse=True)
def short_segments(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """K of a few hundred elements is cut too."""
    monkeypatch.setattr(linear_tiling, "_MIN_SEGMENT", 64)
    yield

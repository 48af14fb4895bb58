"""The full suite and its shorter form, which is what CI has time for."""

from __future__ import annotations

import os

import pytest

# Before torch is imported. Threads that spin while they wait take the processor from the daemons and engines that a
# test waits for, and of two test processes each has one core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what is marked `full`, unless `CORTEX_FULL=1` asks for everything."""
    if os.environ.get("CORTEX_FULL") == "1":
        return
    skip = pytest.mark.skip(reason="a variant of a test that runs; CORTEX_FULL=1 uv run pytest runs it too")
    for item in items:
        if item.get_closest_marker("full") is not None:
            item.add_marker(skip)

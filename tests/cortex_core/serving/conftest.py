"""A real listener, served as both servers do it, and an application that remembers what it was asked."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.cortex_core.serving.harness import Served, serving


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving() as running:
        yield running

"""Servers of both parsers."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.cortex_gateway.http.http1.harness import Server, serving


@pytest.fixture(params=["httptools", "h11"])
async def served(request: pytest.FixtureRequest) -> AsyncIterator[Server]:
    async with serving(request.param) as running:
        yield running


@pytest.fixture
async def strict() -> AsyncIterator[Server]:
    """With httptools."""
    async with serving("httptools") as running:
        yield running

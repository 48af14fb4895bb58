"""A registry that says what a test wants."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.neuron.daemon.hub.harness import FILES, REPO
from tests.neuron.daemon.hub.mock_registry import MockRegistry


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def registry() -> Iterator[MockRegistry]:
    with MockRegistry(REPO, dict(FILES)) as running:
        yield running

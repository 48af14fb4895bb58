"""A whole daemon on a real socket, in this process, with engines that are scripted."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.neuron.daemon.api.harness import RunningNeuron, make_checkpoint, run_neuron


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "checkpoint")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def neuron(checkpoint: Path) -> AsyncIterator[RunningNeuron]:
    """One daemon for a module's tests, which leave it as they found it."""
    async with run_neuron(checkpoint) as running:
        yield running


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    fifo = tmp_path / "gate"
    os.mkfifo(fifo)
    return fifo

"""One daemon for the tests of a module. Each test loads a model with what it needs, and must leave nothing behind."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.chaos.harness import Neuron, Undisturbed, running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def daemon(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Neuron]:
    async with running(tmp_path_factory.mktemp("neuron")) as neuron:
        yield neuron


@pytest_asyncio.fixture(loop_scope="module")
async def neuron(daemon: Neuron) -> AsyncIterator[Neuron]:
    """The module's daemon with no model loaded; afterwards it holds what it held before, and no more."""
    before = await daemon.belongings()
    yield daemon
    for model in await daemon.get("/models"):
        if model["status"] == "loaded":
            await daemon.holds_no_pages(model["id"])
        await daemon.unload(model["id"])
    await daemon.leaves_nothing_behind(before)


@pytest.fixture(scope="module")
def undisturbed() -> Undisturbed:
    return Undisturbed()

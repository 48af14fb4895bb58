"""A neuron as a real process with the demo model loaded, and a client that goes on asking it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.chaos.harness import CONFIG, MODEL, Belongings, Neuron, running
from tests.hostile.harness import QUESTION, Good

SETTINGS = (
    CONFIG.replace("[engine]", "[engine]\nrecovery_attempts = 2")
    + """
[text]
cpu_s = 1.0
memory_mb = 256
"""
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def good(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Good]:
    async with running(
        tmp_path_factory.mktemp("neuron"),
        config=SETTINGS,
    ) as neuron:
        await neuron.load(max_model_len=4096)
        answer = await neuron.ask(QUESTION)
        assert answer.status == 200 and answer.text, answer
        yield Good(neuron, answer.said)


@pytest_asyncio.fixture(loop_scope="module")
async def neuron(good: Good) -> AsyncIterator[Neuron]:
    """The module's neuron; afterwards only the good model is there, and nothing that was not there before."""
    before: Belongings = await good.neuron.belongings()
    yield good.neuron
    for model in await good.neuron.get("/models"):
        if model["id"] != MODEL:  # of a test that has failed: the next one is not to fail with it
            await good.neuron.unload(model["id"])
            pytest.fail(f"{model['id']} is still {model['status']}")
    await good.neuron.leaves_nothing_behind(before)
    assert [model["id"] for model in await good.neuron.get("/models")] == [MODEL]

"""A neuron as a real process with the demo model loaded, and a client that goes on asking it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
import pytest_asyncio

from tests.chaos.harness import CONFIG, MODEL, Belongings, Neuron, running

QUESTION: dict[str, Any] = {"messages": [{"role": "user", "content": "What is 12+30?"}], "temperature": 0}
PACE_S = 0.2
SETTINGS = (
    CONFIG.replace("[engine]", "[engine]\nrecovery_attempts = 2")
    + """
[text]
cpu_s = 1.0
memory_mb = 256
"""
)


@dataclass
class Good:
    """The model that must go on answering. expected: what it says when nothing happens."""

    neuron: Neuron
    expected: tuple[str, str | None]
    num_answers: int = 0
    wrong: list[Any] = field(default_factory=list)

    @asynccontextmanager
    async def asked_meanwhile(self) -> AsyncIterator[None]:
        """Asked again and again while the body runs, once at least; every answer must be the one it always gives."""
        is_over = asyncio.Event()

        async def ask() -> None:
            while True:
                answer = await self.neuron.ask(QUESTION, stream=bool(self.num_answers % 2))
                self.num_answers += 1
                if answer.said != self.expected:
                    self.wrong.append(answer)
                await self.neuron.get("/health")
                with suppress(TimeoutError):
                    await asyncio.wait_for(is_over.wait(), PACE_S)
                    return

        asking = asyncio.create_task(ask())
        try:
            yield
        finally:
            is_over.set()
            await asking
        assert not self.wrong, self.wrong[:3]


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

"""One daemon for the tests of a module. Each test loads a model with what it needs, and must leave nothing behind."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from typing import Any

import pytest
import pytest_asyncio

from tests.chaos.harness import Answer, Neuron, running


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


class Undisturbed:
    """The answers that requests get when nothing happens to their engine."""

    def __init__(self) -> None:
        self._known: dict[str, Answer] = {}

    async def answers(self, neuron: Neuron, requests: Iterable[dict[str, Any]], **spec: Any) -> list[Answer]:
        """Each asked once in a module; loads the model for that, and unloads it."""
        wanted = {json.dumps([request, spec], sort_keys=True): request for request in requests}
        missing = {key: request for key, request in wanted.items() if key not in self._known}
        if missing:
            await neuron.load(**spec)
            answers = await asyncio.gather(*map(neuron.ask, missing.values()))
            for key, answer in zip(missing, answers, strict=True):
                assert answer.status == 200 and answer.error is None and answer.text, answer
                self._known[key] = answer
            await neuron.unload()
        return [self._known[key] for key in wanted]


@pytest.fixture(scope="module")
def undisturbed() -> Undisturbed:
    return Undisturbed()

"""A model that is asked again and again, and must always give the same answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.harness import Neuron

QUESTION: dict[str, Any] = {"messages": [{"role": "user", "content": "What is 12+30?"}], "temperature": 0}


PACE_S = 0.2


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

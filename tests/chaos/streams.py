"""Requests whose answers are long enough to be interrupted, many of them at a time, and what they must become."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.chaos.harness import PATHS, Answer, Neuron


def ask_for(text: str, *, max_tokens: int = 400, **settings: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": max_tokens, **settings}


GREEDY = ask_for("Count from 1 to 60.", temperature=0)
SEEDED = ask_for("Count from 1 to 60.", temperature=1.5, seed=7)
SHORT = ask_for("What is 12+30?", temperature=0, max_tokens=40)


def crowd(number: int, **settings: Any) -> list[dict[str, Any]]:
    """Different requests with long answers. Some are drawn, of those that `Streams` sends in the dialect with seeds."""
    return [
        ask_for(
            f"Count from {index + 1} to {index + 50}.",
            **({"temperature": 1.0, "seed": index} if index % 4 == 2 else {"temperature": 0}),
            **settings,
        )
        for index in range(number)
    ]


class Streams:
    """Requests in flight at the same time, in both dialects by turns."""

    def __init__(self, neuron: Neuron, requests: list[dict[str, Any]]) -> None:
        self._lengths = [0] * len(requests)
        self._more = asyncio.Event()
        self._tasks = [
            asyncio.create_task(neuron.ask(request, path=PATHS[index % 2], on_text=self._on_text(index)))
            for index, request in enumerate(requests)
        ]

    def _on_text(self, index: int) -> Any:
        def note(text: str) -> None:
            self._lengths[index] = len(text)
            self._more.set()

        return note

    async def have_begun(self) -> None:
        """Every client has read some text, and none is done."""
        while not all(self._lengths):
            self._more.clear()
            await self._more.wait()
        assert not any(task.done() for task in self._tasks), "too short an answer: nothing is in flight any more"

    async def answers(self) -> list[Answer]:
        return await asyncio.gather(*self._tasks)


def assert_same(answers: list[Answer], expected: list[Answer]) -> None:
    """Every answer is whole and equals the one that the request gets when nothing happens."""
    for answer, wanted in zip(answers, expected, strict=True):
        assert (answer.status, answer.error) == (200, None)
        assert answer.text == wanted.text
        assert answer.finish in (wanted.finish, {"stop": "end_turn", "length": "max_tokens"}[str(wanted.finish)])

"""Requests of this gateway in flight, per node and model.

Polled figures are seconds old. A node's load is what it last said plus what was sent since, minus what came back.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Protocol

from cortex_core.fleet import ModelLoad

Key = tuple[str, str]
"""(node, model)"""


class Answer(Protocol):
    """An answer on its way through the gateway. Times are monotonic seconds."""

    @property
    def first_byte_at(self) -> float | None: ...

    @property
    def last_byte_at(self) -> float: ...


class Activity:
    """Counters of one gateway. Changed only by leases and by the poller; read by the decisions."""

    def __init__(self) -> None:
        self._answers: dict[str, set[Answer]] = {}
        self._in_flight: dict[Key, int] = {}
        self._at_poll: dict[Key, int] = {}
        self._last_used: dict[Key, float] = {}

    def begin(self, node: str, model: str, now: float) -> None:
        key = (node, model)
        self._in_flight[key] = self._in_flight.get(key, 0) + 1
        self._last_used[key] = now

    def end(self, node: str, model: str) -> None:
        key = (node, model)
        remaining = self._in_flight[key] - 1
        if remaining:
            self._in_flight[key] = remaining
        else:
            del self._in_flight[key]

    def listen(self, node: str, answer: Answer) -> None:
        """The node is writing this answer: its bytes are signs of life, and cost nothing to keep."""
        self._answers.setdefault(node, set()).add(answer)

    def unlisten(self, node: str, answer: Answer) -> None:
        self._answers.get(node, set()).discard(answer)

    def is_heard_since(self, node: str, moment: float) -> bool:
        """Whether a piece of any answer has arrived from the node since then."""
        return any(
            answer.first_byte_at is not None and answer.last_byte_at >= moment for answer in self._answers.get(node, ())
        )

    def heard_at(self, node: str) -> float:
        """When the last piece of an answer that is still being written came from the node; -inf if none did."""
        return max(
            (answer.last_byte_at for answer in self._answers.get(node, ()) if answer.first_byte_at is not None),
            default=float("-inf"),
        )

    def in_flight(self, node: str, model: str) -> int:
        return self._in_flight.get((node, model), 0)

    def leaving(self, nodes: Container[str]) -> dict[str, int]:
        """Requests in flight on nodes that are not among these: taken out of the configuration, they go on there."""
        found: dict[str, int] = {}
        for (node, _), count in self._in_flight.items():
            if node not in nodes:
                found[node] = found.get(node, 0) + count
        return found

    def total_in_flight(self) -> int:
        return sum(self._in_flight.values())

    def last_used(self, node: str, model: str) -> float:
        """Monotonic seconds of the last request sent there; -inf if this gateway never used it."""
        return self._last_used.get((node, model), float("-inf"))

    def mark(self, node: str, model: str, now: float) -> None:
        """Count a load as a use, or a model just loaded would be the first to go."""
        self._last_used[(node, model)] = now

    def begin_poll(self, node: str) -> None:
        """Remember what was in flight when the node was asked: its answer counts those."""
        for key in [key for key in self._at_poll if key[0] == node]:
            del self._at_poll[key]
        self._at_poll.update((key, count) for key, count in self._in_flight.items() if key[0] == node)

    def load_of(self, node: str, model: str, polled: ModelLoad | None) -> int:
        """Requests running or queued: polled plus sent since."""
        own = self._in_flight.get((node, model), 0)
        if polled is None:
            return own
        return max(polled.in_flight + polled.queue_depth + own - self._at_poll.get((node, model), 0), own)

    def is_busy(self, node: str, model: str, polled: ModelLoad | None) -> bool:
        return self.load_of(node, model, polled) > 0

    def forget_absent(self, node: str, models: frozenset[str]) -> None:
        """Drop what is known of models a node no longer has, or memory grows with every name ever served."""
        for key in [key for key in self._last_used if key[0] == node and key[1] not in models]:
            if key not in self._in_flight:
                del self._last_used[key]

    def forget(self, node: str) -> None:
        """The node is no more, or another server has its name. What is in flight there is counted to its end."""
        self._answers.pop(node, None)
        for counters in (self._at_poll, self._last_used):
            for key in [key for key in counters if key[0] == node]:
                del counters[key]

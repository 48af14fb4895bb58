"""Queues of waiting requests, one per model: when a model comes, all who wait for it go."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import msgspec


class Waiter(msgspec.Struct, frozen=True):
    """One model's queue. since: monotonic seconds when its oldest request began to wait."""

    model: str
    since: float
    num_requests: int


class WaitingQueue:
    """The requests of one gateway that no node serves yet. Changed by `Placement.wait`, read by the decisions.

    queues: for each model, since when each of its requests waits, by its ticket.
    """

    def __init__(self) -> None:
        self.queues: dict[str, dict[object, float]] = {}

    def __bool__(self) -> bool:
        return bool(self.queues)

    def __contains__(self, model: str) -> bool:
        return model in self.queues

    def since(self, model: str) -> float | None:
        queue = self.queues.get(model)
        return next(iter(queue.values())) if queue else None

    def num_requests(self, model: str) -> int:
        return len(self.queues.get(model, ()))

    def in_order(self) -> list[Waiter]:
        """The queues, the one with the oldest request first; ties by name."""
        waiters = [
            Waiter(model=model, since=next(iter(queue.values())), num_requests=len(queue))
            for model, queue in self.queues.items()
        ]
        return sorted(waiters, key=lambda waiter: (waiter.since, waiter.model))

    def join(self, model: str, now: float) -> object:
        """Enter the model's queue; returns the ticket to leave with. The first of a queue is its oldest."""
        ticket = object()
        self.queues.setdefault(model, {})[ticket] = now
        return ticket

    def leave(self, model: str, ticket: object) -> None:
        queue = self.queues[model]
        del queue[ticket]
        if not queue:
            del self.queues[model]

    @contextmanager
    def joined(self, model: str, now: float) -> Iterator[None]:
        """In the model's queue while held."""
        ticket = self.join(model, now)
        try:
            yield
        finally:
            self.leave(model, ticket)

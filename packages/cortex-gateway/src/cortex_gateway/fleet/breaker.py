"""A circuit breaker per node and model: who fails fast must not look idle.

closed → (so many failures in a row) → open → (the back-off is over) → half-open, which lets one request try →
closed again, or open for twice as long. A client that hangs up says nothing about the node and changes nothing, but
gives the try back. The transitions are pure; `Breakers` only keeps the states that are not the initial one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import msgspec
from cortex_core.gateway_config import BreakerSection

BreakerState = Literal["closed", "open", "half_open"]

Key = tuple[str, str]
"""(node, model)"""


class Breaker(msgspec.Struct, frozen=True):
    """failures: in a row. openings: in a row, without a whole answer between them. until: when a try is due."""

    state: BreakerState = "closed"
    failures: int = 0
    openings: int = 0
    until: float = 0.0

    def admits(self, now: float) -> bool:
        return self.state == "closed" or (self.state == "open" and now >= self.until)


CLOSED = Breaker()


def begun(breaker: Breaker) -> Breaker:
    """A request was sent. Through an open breaker (its back-off being over) that is the one try."""
    return msgspec.structs.replace(breaker, state="half_open") if breaker.state == "open" else breaker


def answering(breaker: Breaker, settings: BreakerSection) -> Breaker:
    """The node began to answer: others may come too, but the next failure opens the breaker again."""
    if breaker.state != "half_open":
        return breaker
    return Breaker(state="closed", failures=max(settings.failures - 1, 0), openings=breaker.openings)


def succeeded(breaker: Breaker) -> Breaker:
    """A whole answer, or a refusal that was the request's own fault."""
    return CLOSED


def failed(breaker: Breaker, now: float, settings: BreakerSection) -> Breaker:
    failures = breaker.failures + 1
    if breaker.state == "open":
        return msgspec.structs.replace(breaker, failures=failures)  # sent before it opened: old news
    if breaker.state == "closed" and (not settings.failures or failures < settings.failures):
        return msgspec.structs.replace(breaker, failures=failures)
    backoff_s = min(settings.backoff_s * 2.0 ** min(breaker.openings, 30), settings.max_backoff_s)
    return Breaker(state="open", failures=failures, openings=breaker.openings + 1, until=now + backoff_s)


def abandoned(breaker: Breaker, now: float) -> Breaker:
    """The try ended without a verdict (the client hung up): the next request is the try."""
    return msgspec.structs.replace(breaker, state="open", until=now) if breaker.state == "half_open" else breaker


class Breakers:
    """The breakers of one gateway. Changed by leases, read by the decisions. by_place: those that are not closed;
    rests: until when nothing is sent where something else can be asked;
    num_opened: how often each has opened."""

    def __init__(self, settings: BreakerSection, on_change: Callable[[str, str, Breaker], None] | None = None) -> None:
        self.settings = settings
        self._on_change = on_change
        self.by_place: dict[Key, Breaker] = {}
        self.num_opened: dict[Key, int] = {}
        self.rests: dict[Key, float] = {}

    def get(self, node: str, model: str) -> Breaker:
        return self.by_place.get((node, model), CLOSED)

    def items(self) -> Iterator[tuple[Key, Breaker]]:
        return iter(self.by_place.items())

    def begun(self, node: str, model: str) -> bool:
        """Whether this request is the one try of a breaker that was open."""
        before = self.by_place.get((node, model))
        if before is None or before.state != "open":
            return False
        self._set(node, model, begun(before))
        return True

    def answering(self, node: str, model: str) -> None:
        self._set(node, model, answering(self.get(node, model), self.settings))

    def succeeded(self, node: str, model: str) -> None:
        if (node, model) in self.by_place:
            self._set(node, model, CLOSED)

    def failed(self, node: str, model: str, now: float) -> None:
        self._set(node, model, failed(self.get(node, model), now, self.settings))

    def abandoned(self, node: str, model: str, now: float) -> None:
        self._set(node, model, abandoned(self.get(node, model), now))

    def rest(self, node: str, model: str, until: float) -> None:
        """The node has said when it may be asked again. That is no failure of it."""
        self.rests[(node, model)] = max(until, self.rests.get((node, model), until))

    def forget_absent(self, node: str, models: frozenset[str]) -> None:
        """Drop what is known of models a node no longer has."""
        for key in [key for key in self.by_place if key[0] == node and key[1] not in models]:
            del self.by_place[key]
        for key in [key for key in self.rests if key[0] == node and key[1] not in models]:
            del self.rests[key]

    def _set(self, node: str, model: str, after: Breaker) -> None:
        before = self.by_place.get((node, model), CLOSED)
        if after == CLOSED:
            self.by_place.pop((node, model), None)
        else:
            self.by_place[(node, model)] = after
        if after.openings > before.openings:
            self.num_opened[(node, model)] = self.num_opened.get((node, model), 0) + 1
        if after.state != before.state and self._on_change is not None:
            self._on_change(node, model, after)

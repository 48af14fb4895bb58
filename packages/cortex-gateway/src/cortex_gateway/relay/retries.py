"""Retries: why a request is asked again, and how often it may be."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from cortex_gateway.relay.request_state import RequestState

MAX_ATTEMPTS = 2
MAX_RESUMES = 8


class StaleRoute(Exception):
    """The neuron does not have the model after all, or closed the connection unanswered: it is routed again."""


class NotServed(StaleRoute):
    """The node could not be reached, or refused, and another one can be asked. It counts as a failure of the node."""


class BrokenStream(Exception):
    """The neuron was cut off in the middle of a stream, and another one can go on with it."""


class Unanswered(Exception):
    """A try ended without anything of an answer, and maybe with the process that worked on it.

    engine: what the neuron says has ended. settle: where it says nothing, raises what comes of it if its own process
    has not ended.
    """

    def __init__(self, *, engine: str | None = None, settle: Callable[[], NoReturn] | None = None) -> None:
        super().__init__()
        self.settle = settle
        self.engine = engine


def go_elsewhere(request: RequestState, how: StaleRoute | BrokenStream, engine: str | None) -> NoReturn:
    """engine: that has ended while it held the request, if one has."""
    if engine is not None and not request.has_answered:
        raise Unanswered(engine=engine)
    raise how

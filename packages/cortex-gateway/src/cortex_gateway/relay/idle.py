"""The watch over a neuron that says nothing."""

from __future__ import annotations

import asyncio
import logging

from cortex_core.errors import ApiError

from cortex_gateway.fleet.poller import Poller
from cortex_gateway.relay.exchange import Exchange

log = logging.getLogger(__name__)


class IdleWatch:
    """Ends a request whose neuron says nothing for too long: idle time, never total time (F29).

    While the neuron has not begun to answer, being polled successfully counts as life: a long answer that is not
    streamed is silent by nature.
    """

    __slots__ = ("_exchange", "_handle", "_loop", "_node", "_poller", "_since", "_timeout_s")

    def __init__(
        self, exchange: Exchange, node: str, timeout_s: float, poller: Poller, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._exchange = exchange
        self._node = node
        self._loop = loop
        self._timeout_s = timeout_s
        self._poller = poller
        self._since = loop.time()
        self._handle = loop.call_later(timeout_s, self._check) if timeout_s > 0 else None

    def cancel(self) -> None:
        if self._handle is not None:
            self._handle.cancel()

    def _check(self) -> None:
        exchange = self._exchange
        last = max(self._since, exchange.last_byte_at)
        if not exchange.response_started:
            last = max(last, self._poller.answered_at(self._node))
        remaining = last + self._timeout_s - self._loop.time()
        if remaining > 0:
            self._handle = self._loop.call_later(remaining, self._check)
            return
        log.warning("request %s: nothing moved on node %s for %g s", exchange.request_id, self._node, self._timeout_s)
        exchange.interrupt(
            ApiError(
                "timeout",
                f"The neuron sent nothing for {self._timeout_s:g} s.",
                code="upstream_timeout",
                retry_after=1,
            )
        )

"""The watch over a neuron that says nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from cortex_core.errors import ApiError

from cortex_gateway.fleet.neuron import NeuronClient
from cortex_gateway.relay.request_state import RequestState

log = logging.getLogger(__name__)


class UpstreamTimeout:
    """Ends a request whose neuron says nothing for too long: idle time, never total time (F29).

    While the neuron has not begun to answer, being polled successfully counts as life: a long answer that is not
    streamed is silent by nature. A stream that another neuron could go on with is not given so long: `silence_s`
    after its last byte, a ping of the neuron included, `cut` is called.
    """

    __slots__ = ("_cut", "_exchange", "_handle", "_loop", "_neuron", "_silence_s", "_since", "_timeout_s")

    def __init__(
        self,
        exchange: RequestState,
        neuron: NeuronClient,
        timeout_s: float,
        loop: asyncio.AbstractEventLoop,
        *,
        silence_s: float,
        cut: Callable[[], None],
    ) -> None:
        self._exchange = exchange
        self._neuron = neuron
        self._loop = loop
        self._timeout_s = timeout_s
        self._since = loop.time()
        self._silence_s = silence_s
        self._cut = cut
        waits = [wait_s for wait_s in (timeout_s, silence_s) if wait_s > 0]
        self._handle = loop.call_later(min(waits), self._check) if waits else None

    def cancel(self) -> None:
        if self._handle is not None:
            self._handle.cancel()

    def _check(self) -> None:
        exchange, now = self._exchange, self._loop.time()
        if exchange.is_sending:
            self._since = now  # It is the client that is slow, and the neuron that is kept waiting.
        last = max(self._since, exchange.last_byte_at)
        waits = []
        if self._silence_s > 0 and exchange.stream is not None and exchange.stream.is_resumable:
            waits.append(last + self._silence_s - now)
            if waits[0] <= 0:
                log.warning("request %s: node %s fell silent", exchange.request_id, self._neuron.name)
                self._cut()
                return
        elif self._silence_s > 0:
            waits.append(self._silence_s)
        if self._timeout_s > 0:
            if not exchange.response_started:
                last = max(last, self._neuron.answered_at)
            waits.append(last + self._timeout_s - now)
        remaining = min(waits)
        if remaining > 0:
            self._handle = self._loop.call_later(remaining, self._check)
            return
        log.warning(
            "request %s: nothing moved on node %s for %g s", exchange.request_id, self._neuron.name, self._timeout_s
        )
        exchange.interrupt(
            ApiError(
                "timeout",
                f"The neuron sent nothing for {self._timeout_s:g} s.",
                code="upstream_timeout",
                retry_after=1,
            )
        )

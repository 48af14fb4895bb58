"""Upstream idle timeout: ends the request whose neuron says nothing for too long."""

from __future__ import annotations

import logging
from collections.abc import Callable

from cortex_core.errors import ApiError
from cortex_core.gateway_config import GatewaySection

from cortex_gateway.fleet.neuron import NeuronClient
from cortex_gateway.relay.request_state import RequestState

logger = logging.getLogger(__name__)


class UpstreamTimeout:
    """Idle time, never total time (F29), for one attempt.

    While the neuron has not begun to answer, being polled successfully counts as life: a long answer that is not
    streamed is silent by nature. What another node could take over is not given so long, `stream_silence_s` after the
    last byte, a ping of the neuron included: a stream that another neuron could go on with; and, where another node
    serves the model (`has_other`), what has no byte of answer yet. `leave` is called then.
    """

    __slots__ = ("_handle", "_has_other", "_leave", "_neuron", "_request", "_silence_s", "_since", "_timeout_s")

    def __init__(
        self,
        request: RequestState,
        neuron: NeuronClient,
        settings: GatewaySection,
        *,
        leave: Callable[[], None],
        has_other: Callable[[], bool],
    ) -> None:
        self._request = request
        self._neuron = neuron
        self._timeout_s = settings.upstream_idle_timeout_s
        self._silence_s = settings.stream_silence_s
        self._leave = leave
        self._has_other = has_other
        self._since = request.loop.time()
        waits = [wait_s for wait_s in (self._timeout_s, self._silence_s) if wait_s > 0]
        self._handle = request.loop.call_later(min(waits), self._check) if waits else None

    def cancel(self) -> None:
        if self._handle is not None:
            self._handle.cancel()

    def _check(self) -> None:
        request, now = self._request, self._request.loop.time()
        if request.writer.is_sending:
            self._since = now  # It is the client that is slow, and the neuron that is kept waiting.
        last = max(self._since, request.last_byte_at)
        waits = []
        if self._silence_s > 0:
            heard_at, is_replaceable = self._heard_at(last)
            silent_s = heard_at + self._silence_s - now
            if silent_s <= 0 and is_replaceable():
                logger.warning("request %s: node %s fell silent", request.request_id, self._neuron.name)
                self._leave()
                return
            waits.append(silent_s if silent_s > 0 else self._silence_s)
        if self._timeout_s > 0:
            if not request.has_begun:
                last = max(last, self._neuron.answered_at)
            waits.append(last + self._timeout_s - now)
        remaining = min(waits)
        if remaining > 0:
            self._handle = request.loop.call_later(remaining, self._check)
            return
        logger.warning(
            "request %s: nothing moved on node %s for %g s", request.request_id, self._neuron.name, self._timeout_s
        )
        request.interrupt(
            ApiError(
                "timeout",
                f"The neuron sent nothing for {self._timeout_s:g} s.",
                code="upstream_timeout",
                retry_after=1,
            )
        )

    def _heard_at(self, last: float) -> tuple[float, Callable[[], bool]]:
        """When the last sign of life came, as it counts for this request; and whether another node can take over."""
        request = self._request
        if request.stream is not None and request.stream.is_resumable:
            return last, always
        if request.has_answered:
            return last, never
        if request.is_stream and request.has_begun and request.translation is None:
            return last, self._has_other  # it pings; before, it may be reading a long body
        return max(last, self._neuron.answered_at), self._has_other


def always() -> bool:
    return True


def never() -> bool:
    return False

"""One request's sequences in an engine group: updates in, one wake-up per step out, cancelled on the way out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

import msgspec
from cortex_core.errors import ApiError

from neuron.protocol import Generate, SequenceUpdate

Update = tuple[int, SequenceUpdate]
"""Index of the choice, and what a step did for it."""


class LiveSequence:
    """One sequence in flight, with all that another engine needs to go on where this one stops.

    number: place in the order of arrival. request_id: of its present submission, which each engine gets anew so that
    no frame of an earlier one can be taken for it; 0 while it is in no engine. output_ids: what was delivered here.
    num_faults, num_output_at_fault: see `fault_attribution`.
    """

    __slots__ = (
        "choice",
        "generate",
        "generation",
        "has_cached_tokens",
        "has_prompt_logprobs",
        "num_faults",
        "num_output_at_fault",
        "number",
        "output_ids",
        "request_id",
    )

    def __init__(self, number: int, choice: int, generate: Generate, generation: Generation) -> None:
        self.number = number
        self.choice = choice
        self.generate = generate
        self.generation = generation
        self.request_id = 0
        self.output_ids: list[int] = []
        self.has_cached_tokens = False
        self.has_prompt_logprobs = False
        self.num_faults = 0
        self.num_output_at_fault = 0

    def submission(self, request_id: int) -> Generate:
        """The frame that starts it in an engine, or lets it go on there: nothing is asked for a second time."""
        asked = self.generate
        return msgspec.structs.replace(
            asked,
            request_id=request_id,
            output_ids=(*asked.output_ids, *self.output_ids),
            prompt_logprobs=asked.prompt_logprobs and not self.has_prompt_logprobs,
        )

    def without_repetition(self, update: SequenceUpdate) -> SequenceUpdate:
        """What of an update the client has not been told by an earlier engine. Tokens never repeat; the count of
        cached prompt tokens, told at every start, does."""
        if update.prompt_logprobs is not None:
            self.has_prompt_logprobs = True
        if update.cached_tokens is not None:
            if self.has_cached_tokens:
                return msgspec.structs.replace(update, cached_tokens=None)
            self.has_cached_tokens = True
        return update


class Generation:
    """The sequences of one request, as an async iterator of what the steps since the last look did.

    A batch holds every update since the previous one; an empty batch means that nothing came for `heartbeat_s`.
    Iteration ends when every sequence has ended, and raises the `ApiError` of the first that failed. Leaving the
    context cancels what still runs. `heartbeat_s` may be changed at any time, for the beats that follow.
    `ended_engine`: the last engine that ended while it held a sequence of the request.
    """

    def __init__(self, forget: Callable[[LiveSequence], None], *, heartbeat_s: float | None = None) -> None:
        self._forget = forget
        self.heartbeat_s = heartbeat_s
        self.ended_engine: str | None = None
        self._live: dict[int, LiveSequence] = {}
        self._pending: list[Update] = []
        self._error: ApiError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._last_return = self._loop.time()

    @property
    def num_live(self) -> int:
        return len(self._live)

    @property
    def sequences(self) -> list[LiveSequence]:
        """The sequences that still run, by choice."""
        return list(self._live.values())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[Update]:
        if not self._pending and self._error is None and self._live:
            await self._wait()
        self._last_return = self._loop.time()
        if self._pending:
            batch, self._pending = self._pending, []
            return batch
        if self._error is not None:
            raise self._error
        if not self._live:
            raise StopAsyncIteration
        return []

    def end_choice(self, choice: int) -> None:
        """The caller wants no more of this choice (a stop string was found): its sequence is cancelled."""
        sequence = self._live.pop(choice, None)
        if sequence is not None:
            self._forget(sequence)

    def cancel(self) -> None:
        """Cancel every sequence that still runs. Idempotent."""
        for choice in list(self._live):
            self.end_choice(choice)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._wake()

    # ------------------------------------------------------------------ for the group

    def add(self, sequence: LiveSequence) -> None:
        self._live[sequence.choice] = sequence

    def push(self, sequence: LiveSequence, update: SequenceUpdate) -> None:
        """Called within a step's dispatch; however many sequences of this request it concerns, one wake-up follows."""
        sequence.output_ids += update.token_ids
        self._pending.append((sequence.choice, update))
        if update.finish is not None:
            self._live.pop(sequence.choice, None)
        self._wake()

    def fail(self, error: ApiError, *, failed: LiveSequence | None = None) -> None:
        """End the request with `error`, after the updates that came before it. `failed` is already gone."""
        if self._error is None:
            self._error = error
        if failed is not None:
            self._live.pop(failed.choice, None)
        for choice in list(self._live):
            self.end_choice(choice)
        self._wake()

    # ------------------------------------------------------------------ waiting

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _wait(self) -> None:
        if self.heartbeat_s is not None and self._timer is None:
            self._arm(self.heartbeat_s)
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _arm(self, delay_s: float) -> None:
        """One timer for the whole stream, moved on lazily: a token costs no timer operation."""
        self._timer = self._loop.call_later(delay_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if self.heartbeat_s is None:
            return
        due = self._last_return + self.heartbeat_s
        now = self._loop.time()
        if due > now:
            self._arm(due - now)
            return
        self._arm(self.heartbeat_s)
        self._wake()

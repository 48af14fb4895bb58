"""Admission to a model: seats, the queue, and refusals.

A request takes a place before anything is awaited, says what it needs of the KV cache as soon as its prompt is known,
and is given pages and a seat together, pages being looked at first: nobody holds the one while waiting for the other,
so there is no circle to wait in (F18). Its context manager gives everything back, so a client that leaves at any
moment leaves no trace (F16).

Fairness is per principal (an account or key, see `Exchange.principal`): the next seat goes to the principal with the
fewest requests at work, among equals to the one whose last turn is longest ago, and who is next is not overtaken while
its pages are not free. So while a principal with nothing at work waits, every other one gets at most one turn. Priority
works within that: a principal's own requests are taken by it, and what it has at work counts half with a high priority
and twice with a low one, so that seats are shared one to two to four, and nobody starves. Requests
without identity live on what is left: they are seated while no identified request waits, and one seat and one place
stay out of their reach (F21). When every place is taken, the principal with the longest queue loses its youngest
request to a newcomer that has fewer waiting (longest queue drop, Suter et al. 1998).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import TracebackType
from typing import Literal, Self

import msgspec
from cortex_core.errors import ApiError

from neuron.daemon.admission.capacity import KVCapacity, KVNeed

RejectionReason = Literal["queue_full", "wait_timeout", "per_principal", "anon_yield", "kv_timeout", "kv_unservable"]

_LONGEST_RETRY_AFTER_S = 120
# An answer that is longer than expected reserves its further pages for so many tokens at a time.
_GROWTH_TOKENS = 256


class AdmissionLimits(msgspec.Struct, frozen=True):
    """max_in_flight requests work and max_queue_depth wait, for a seat up to max_wait_s, for pages up to kv_max_wait_s.

    max_per_principal: requests of one principal, at work or waiting; 0 for no limit. anon_max_in_flight and
    anon_max_pending: the same two ceilings for requests without identity; None leaves one seat and one place to others,
    and 0 seats refuse them.
    """

    max_in_flight: int
    max_queue_depth: int
    max_wait_s: float
    kv_max_wait_s: float
    max_per_principal: int = 0
    anon_max_in_flight: int | None = None
    anon_max_pending: int | None = None


class _Line:
    """The requests of one principal: how many are at work, and the others in order of arrival.

    turn: how many requests had been seated, of anybody, when this principal's last one was, or when it came.
    """

    __slots__ = ("in_flight", "is_anonymous", "queued", "turn")

    def __init__(self, turn: int, *, is_anonymous: bool) -> None:
        self.turn = turn
        self.is_anonymous = is_anonymous
        self.in_flight = 0
        self.queued: dict[int, Ticket] = {}

    def head(self) -> Ticket | None:
        """The first that has said what it needs, of those with the highest priority."""
        ready = (ticket for ticket in self.queued.values() if ticket.need is not None)
        return max(ready, key=lambda ticket: ticket.priority, default=None)


class Admission:
    """The desk of one model. All of it on the event loop; only `Ticket.wait` waits."""

    def __init__(self, limits: AdmissionLimits) -> None:
        self.max_in_flight = limits.max_in_flight
        self.max_queue_depth = limits.max_queue_depth
        self.in_flight = 0
        self.anon_in_flight = 0
        self.reserved_pages = 0
        self.capacity: KVCapacity | None = None
        # What the engine says of its pages, None while it does not; and pages reserved that it does not count yet.
        self.free_pages: Callable[[], int | None] = lambda: None
        self._unseen_pages = 0
        self.rejected: dict[RejectionReason, int] = dict.fromkeys(
            ("queue_full", "wait_timeout", "per_principal", "anon_yield", "kv_timeout", "kv_unservable"), 0
        )
        self._limits = limits
        self._lines: dict[str | None, _Line] = {}
        self._num_queued = 0
        self._num_arrivals = 0
        self._num_seated = 0
        self._closed: Callable[[], ApiError] | None = None
        self._idle: list[asyncio.Future[None]] = []
        self._idle_since = time.monotonic()

    # ------------------------------------------------------------------ how it is

    @property
    def idle_s(self) -> float | None:
        """Seconds since the last request left; None while one is here."""
        return None if self.in_flight or self.queue_depth else round(time.monotonic() - self._idle_since, 3)

    @property
    def queue_depth(self) -> int:
        """Requests that have a place and no seat."""
        return self._num_queued

    @property
    def num_principals(self) -> int:
        """Principals with a request here; those without identity are one."""
        return len(self._lines)

    @property
    def anon_max_in_flight(self) -> int:
        limit = self._limits.anon_max_in_flight
        return max(self.max_in_flight - 1, 1) if limit is None else limit

    @property
    def anon_max_pending(self) -> int:
        limit = self._limits.anon_max_pending
        return max(self.max_in_flight + self.max_queue_depth - 1, 1) if limit is None else limit

    @property
    def available_pages(self) -> int:
        """Pages that no request has reserved. Never negative: answers may grow beyond what was reserved for them."""
        return 0 if self.capacity is None else max(0, self.capacity.num_pages - self.reserved_pages)

    # ------------------------------------------------------------------ in

    def apply(self, principal: str | None, priority: int = 0) -> Ticket:
        """A place, at once. priority: one of `cortex_core.hop.PRIORITIES`.

        Raises `ApiError`: closed, no place left, or too many of this principal's (429).
        """
        if self._closed is not None:
            raise self._closed()
        line = self._lines.get(principal) or _Line(self._num_seated, is_anonymous=principal is None)
        pending = line.in_flight + len(line.queued)
        limits = self._limits
        if line.is_anonymous:
            if self.anon_max_in_flight == 0:
                raise self._reject("anon_yield", _anonymous_refused())
            if pending >= self.anon_max_pending:
                raise self._reject("anon_yield", self._busy("requests without an API key have no place left"))
        elif limits.max_per_principal and pending >= limits.max_per_principal:
            why = f"{pending} of your requests are here already, and {limits.max_per_principal} may be"
            raise self._reject("per_principal", self._busy(why))
        if self.in_flight + self._num_queued >= self.max_in_flight + self.max_queue_depth and not self._displace(line):
            raise self._reject(
                "queue_full", self._busy(f"{self.in_flight} are being worked on and {self._num_queued} wait")
            )
        self._lines[principal] = line
        self._num_arrivals += 1
        self._num_queued += 1
        ticket = line.queued[self._num_arrivals] = Ticket(self, principal, line, self._num_arrivals, priority)
        return ticket

    def _displace(self, newcomer: _Line) -> bool:
        """Send away the youngest of the longest queue, if that stays at least as long as the newcomer's becomes."""
        longest = max(self._lines.values(), key=lambda line: len(line.queued))
        if len(longest.queued) <= len(newcomer.queued) + 1:
            return False
        victim = next(reversed(longest.queued.values()))
        reason: RejectionReason = "anon_yield" if longest.is_anonymous else "per_principal"
        why = f"{len(longest.queued)} of your requests wait, and another client has fewer"
        self._send_away(victim, self._reject(reason, self._busy(why)))
        return True

    # ------------------------------------------------------------------ seats

    def set_capacity(self, capacity: KVCapacity | None) -> None:
        """The engine's cache, as it came up; None while nothing is known, when pages are not looked at.

        A rebuilt engine may have a smaller one: who waits and no longer fits is told.
        """
        self.capacity = capacity
        for line in list(self._lines.values()):
            for ticket in list(line.queued.values()):
                refusal = None if capacity is None or ticket.need is None else capacity.refusal(ticket.need)
                if refusal is not None:
                    self._send_away(ticket, self._reject("kv_unservable", refusal))
        self._dispatch()

    def _dispatch(self) -> None:
        while self.in_flight < self.max_in_flight:
            ticket = self._next()
            if ticket is None or not self._has_pages(ticket):
                return
            self._seat(ticket)

    def _next(self) -> Ticket | None:
        """Whose turn it is, whether its pages are free or not."""
        best: Ticket | None = None
        best_rank = (0, 0, 0)
        anonymous: Ticket | None = None
        for line in self._lines.values():
            head = line.head()
            if head is None:
                continue
            rank = line.in_flight << (1 - head.priority), line.turn, head.arrival
            if line.is_anonymous:
                anonymous = head
            elif best is None or rank < best_rank:
                best, best_rank = head, rank
        if best is None and self.anon_in_flight < self.anon_max_in_flight:
            return anonymous
        return best

    def _has_pages(self, ticket: Ticket) -> bool:
        """By what was reserved; or, since prompts share pages, by what is free and not spoken for."""
        if self.capacity is None:
            return True
        share = self._share(ticket)
        if self.reserved_pages + share <= self.capacity.num_pages:
            return True
        free_pages = self.free_pages()
        return free_pages is not None and share <= free_pages - self._unseen_pages

    def _share(self, ticket: Ticket) -> int:
        """Pages to reserve: several sequences that do not fit together run one after another."""
        assert ticket.need is not None
        expected = ticket.need.expected
        return expected if self.capacity is None else min(expected, self.capacity.num_pages)

    def _seat(self, ticket: Ticket) -> None:
        line = ticket.line
        del line.queued[ticket.arrival]
        self._num_queued -= 1
        self._num_seated += 1
        line.turn = self._num_seated
        line.in_flight += 1
        self.in_flight += 1
        self.anon_in_flight += line.is_anonymous
        self._reserve(ticket, self._share(ticket))
        ticket.is_seated = True
        ticket.wake()

    def _reserve(self, ticket: Ticket, num_pages: int) -> None:
        ticket.reserved_pages += num_pages
        self.reserved_pages += num_pages
        self._see(ticket, ticket.unseen_pages + num_pages)

    def _see(self, ticket: Ticket, unseen_pages: int) -> None:
        self._unseen_pages += unseen_pages - ticket.unseen_pages
        ticket.unseen_pages = unseen_pages

    # ------------------------------------------------------------------ out

    def close(self, error: Callable[[], ApiError]) -> None:
        """Send away who has no seat and whoever comes; those at work go on."""
        self._closed = error
        for line in list(self._lines.values()):
            for ticket in list(line.queued.values()):
                self._send_away(ticket, error())

    def open(self) -> None:
        self._closed = None

    async def drained(self) -> None:
        """Wait until nobody is at work."""
        while self.in_flight:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._idle.append(waiter)
            await waiter

    def _send_away(self, ticket: Ticket, error: ApiError) -> None:
        self._unqueue(ticket)
        ticket.error = error
        ticket.wake()

    def _unqueue(self, ticket: Ticket) -> None:
        del ticket.line.queued[ticket.arrival]
        self._num_queued -= 1
        self._forget_if_empty(ticket)

    def _forget_if_empty(self, ticket: Ticket) -> None:
        line = ticket.line
        if not line.in_flight and not line.queued:
            del self._lines[ticket.principal]

    def _leave(self, ticket: Ticket) -> None:
        """Whatever this request holds is given back, and the next one gets it."""
        if ticket.is_seated:
            self.in_flight -= 1
            self.anon_in_flight -= ticket.line.is_anonymous
            ticket.line.in_flight -= 1
            self.reserved_pages -= ticket.reserved_pages
            ticket.reserved_pages = 0
            self._see(ticket, 0)
            self._forget_if_empty(ticket)
        elif ticket.error is None:
            self._unqueue(ticket)
        self._dispatch()
        if not self.in_flight:
            for waiter in self._idle:
                if not waiter.done():
                    waiter.set_result(None)
            self._idle.clear()
            self._idle_since = time.monotonic()

    # ------------------------------------------------------------------ errors

    def _reject(self, reason: RejectionReason, error: ApiError) -> ApiError:
        self.rejected[reason] += 1
        return error

    def _retry_after(self) -> int:
        return max(1, min(_LONGEST_RETRY_AFTER_S, (self._num_queued + 1) * 2))

    def _busy(self, why: str) -> ApiError:
        return ApiError(
            "rate_limit", f"Too many requests: {why}.", code="rate_limit_exceeded", retry_after=self._retry_after()
        )

    def _is_short_of_pages(self, ticket: Ticket) -> bool:
        """There would be a seat for it, but those who are in turn wait for pages."""
        if ticket.line.is_anonymous and self.anon_in_flight >= self.anon_max_in_flight:
            return False
        return self.in_flight < self.max_in_flight

    def _timed_out(self, ticket: Ticket, waited_s: float) -> ApiError:
        capacity, need = self.capacity, ticket.need
        retry_after = self._retry_after()
        if self._is_short_of_pages(ticket) and capacity is not None and need is not None:
            return self._reject(
                "kv_timeout",
                ApiError(
                    "overloaded",
                    f"The request waited {waited_s:.0f} s for {capacity.megabytes(need.expected)} MiB of KV cache, of "
                    f"which {capacity.megabytes(self.available_pages)} MiB are free.",
                    code="kv_cache_timeout",
                    retry_after=retry_after,
                    extras={
                        "required_mb": capacity.megabytes(need.expected),
                        "free_mb": capacity.megabytes(self.available_pages),
                    },
                ),
            )
        reason: RejectionReason = "anon_yield" if ticket.line.is_anonymous else "wait_timeout"
        return self._reject(
            reason,
            ApiError(
                "overloaded",
                f"The request waited {waited_s:.0f} s for a free place and got none.",
                code="queue_timeout",
                retry_after=retry_after,
            ),
        )


class Ticket:
    """One request's place, later its seat and its pages; leaving the context gives all of it back."""

    def __init__(self, admission: Admission, principal: str | None, line: _Line, arrival: int, priority: int) -> None:
        self.principal = principal
        self.line = line
        self.arrival = arrival
        self.priority = priority
        self.need: KVNeed | None = None
        self.reserved_pages = 0
        self.unseen_pages = 0
        self.is_seated = False
        self.error: ApiError | None = None
        self._admission = admission
        self._came = asyncio.get_running_loop().time()
        self._turn: asyncio.Future[None] | None = None
        self._covered_tokens = 0
        self._has_prompt = False
        self._is_open = True

    @property
    def max_wait_s(self) -> float:
        """The longest this may take to be seated or sent away."""
        limits = self._admission._limits
        return max(limits.max_wait_s, limits.kv_max_wait_s)

    def request(self, need: KVNeed) -> None:
        """Say what is needed of the KV cache, and stand in line for it; there may be a seat at once.

        Raises `ApiError`: it can never fit (413), or there is no place any more.
        """
        if self.error is not None:
            raise self.error
        capacity = self._admission.capacity
        refusal = None if capacity is None else capacity.refusal(need)
        if refusal is not None:
            raise self._admission._reject("kv_unservable", refusal)
        self.need = need
        self._covered_tokens = need.output_tokens
        self._admission._dispatch()

    def generated(self, num_tokens: int) -> None:
        """So many tokens of output there are in all. Beyond what was expected, more pages are reserved, free or not:
        the engine has given them already, and newcomers must not count on them."""
        if not self._has_prompt and num_tokens and self.is_seated and self._is_open:
            self._prompt_is_computed()
        if num_tokens > self._covered_tokens and self.is_seated and self._is_open:
            self._cover(max(num_tokens, self._covered_tokens + _GROWTH_TOKENS))

    def _prompt_is_computed(self) -> None:
        """From here on the engine counts the prompt's pages, shared ones once: there may be room for others."""
        self._has_prompt = True
        capacity, need = self._admission.capacity, self.need
        if capacity is not None and need is not None and need.num_prompts == 1:
            output_pages = capacity.pages_for(need.output_tokens) + 1
            self._admission._see(self, min(self.unseen_pages, output_pages))
            self._admission._dispatch()

    def _cover(self, num_tokens: int) -> None:
        capacity = self._admission.capacity
        if capacity is not None:
            self._admission._reserve(self, capacity.pages_for(num_tokens - self._covered_tokens))
        self._covered_tokens = num_tokens

    async def wait(self, timeout_s: float) -> bool:
        """Whether there is a seat within `timeout_s`. Raises `ApiError` when sent away or out of time."""
        loop = asyncio.get_running_loop()
        limits = self._admission._limits
        until = loop.time() + timeout_s
        while not self.is_seated:
            if self.error is not None:
                raise self.error
            now = loop.time()
            is_late = now >= self._came + limits.max_wait_s
            is_short = self._admission._is_short_of_pages(self)
            if is_late and not (is_short and now < self._came + limits.kv_max_wait_s):
                self._admission._send_away(self, self._admission._timed_out(self, now - self._came))
                continue
            if now >= until:
                return False
            deadline = self._came + (limits.kv_max_wait_s if is_late else limits.max_wait_s)
            self._turn = loop.create_future()
            await asyncio.wait((self._turn,), timeout=max(0.0, min(until, deadline) - now))
        return True

    def wake(self) -> None:
        """There is a seat, or none any more."""
        if self._turn is not None and not self._turn.done():
            self._turn.set_result(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_open:
            self._is_open = False
            self._admission._leave(self)


def _anonymous_refused() -> ApiError:
    return ApiError(
        "authentication", "This neuron serves no requests without an API key or account.", code="invalid_api_key"
    )

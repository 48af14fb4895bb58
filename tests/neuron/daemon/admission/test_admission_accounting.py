"""Random requests at one desk: no seat, place or page is lost, no queue grows beyond its bound, nobody starves."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from cortex_core.errors import ApiError
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)
from neuron.daemon.admission.admission import Admission, AdmissionLimits, Ticket
from neuron.daemon.admission.capacity import KVCapacity, KVNeed

PLACES = 5
PRINCIPALS = (None, "a", "b", "c", "d")


def capacity(num_pages: int) -> KVCapacity:
    return KVCapacity(num_pages=num_pages, page_size=16, bytes_per_token=1024)


class AdmissionMachine(RuleBasedStateMachine):
    """Requests come, ask, grow and leave in any order, while the desk closes, opens and gets another cache."""

    tickets = Bundle("tickets")

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.here: list[Ticket] = []
        # Of each principal that waits with nothing at work: how often each other one has been seated since.
        self.turns: dict[str, dict[str | None, int]] = {}
        self.seated: set[Ticket] = set()

    @initialize(seats=st.integers(1, 3), num_pages=st.sampled_from([20, 1000]))
    def open_the_desk(self, seats: int, num_pages: int) -> None:
        self.seats = seats
        self.anon_seats = max(seats - 1, 1)
        limits = AdmissionLimits(max_in_flight=seats, max_queue_depth=PLACES, max_wait_s=1e6, kv_max_wait_s=1e6)
        self.admission = self.within(lambda: Admission(limits))
        self.admission.set_capacity(capacity(num_pages))
        self.free_pages: int | None = None
        self.admission.free_pages = lambda: self.free_pages

    @rule(free_pages=st.none() | st.integers(0, 20))
    def report(self, free_pages: int | None) -> None:
        """The engine says how many pages are free, which may be more than were not reserved, and outdated."""
        self.free_pages = free_pages

    def within(self, act):  # type: ignore[no-untyped-def]
        """Tickets belong to a running loop."""

        async def run():  # type: ignore[no-untyped-def]
            return act()

        return self.loop.run_until_complete(run())

    @rule(target=tickets, principal=st.sampled_from(PRINCIPALS), minimum=st.integers(1, 6), more=st.integers(0, 8))
    def come_and_ask(self, principal: str | None, minimum: int, more: int) -> Ticket | None:
        return self.come_and_ask_now(principal, minimum, more)

    def come_and_ask_now(self, principal: str | None, minimum: int, more: int) -> Ticket | None:
        ticket = self.come(principal)
        self.ask(ticket, minimum, more)
        return ticket

    @rule(target=tickets, principal=st.sampled_from(PRINCIPALS))
    def come_and_prepare(self, principal: str | None) -> Ticket | None:
        return self.come(principal)

    def come(self, principal: str | None) -> Ticket | None:
        before = dict(self.admission.rejected)
        queued = {other: self.queued(other) for other in PRINCIPALS}
        num_pending = sum(not ticket.error for ticket in self.here)
        try:
            ticket = self.within(lambda: self.admission.apply(principal))
        except ApiError as exc:
            if exc.code != "shutting_down":
                assert exc.retry_after is not None
                assert num_pending >= self.seats + PLACES - (principal is None)  # only full houses send away
                if self.admission.rejected["queue_full"] > before["queue_full"]:
                    assert max(queued.values()) <= queued[principal] + 1
            return None
        self.here.append(ticket)
        # Nobody is sent away by a newcomer but the youngest of the longest queue.
        now = {other: self.queued(other) for other in PRINCIPALS}
        now[principal] -= 1
        losers = [other for other in PRINCIPALS if now[other] != queued[other]]
        assert len(losers) <= 1 and all(queued[other] == max(queued.values()) for other in losers)
        assert all(now[other] == queued[other] - 1 >= now[principal] + 1 for other in losers)
        assert not losers or num_pending == self.seats + PLACES
        return ticket

    def queued(self, principal: str | None) -> int:
        return sum(t.principal == principal and not t.is_seated and not t.error for t in self.here)

    @rule(ticket=tickets, minimum=st.integers(1, 12), more=st.integers(0, 30))
    def ask_now(self, ticket: Ticket | None, minimum: int, more: int) -> None:
        self.ask(ticket, minimum, more)

    def ask(self, ticket: Ticket | None, minimum: int, more: int) -> None:
        if ticket is None or ticket not in self.here or ticket.need is not None:
            return
        with suppress(ApiError):
            self.within(lambda: ticket.request(KVNeed(minimum, minimum + more, output_tokens=16 * more)))

    @rule(ticket=tickets, num_tokens=st.integers(0, 2000))
    def grow(self, ticket: Ticket | None, num_tokens: int) -> None:
        if ticket is not None:
            self.within(lambda: ticket.generated(num_tokens))

    @rule(ticket=consumes(tickets))
    def leave(self, ticket: Ticket | None) -> None:
        if ticket is not None and ticket in self.here:
            self.leave_now(ticket)

    def leave_now(self, ticket: Ticket) -> None:
        self.here.remove(ticket)
        self.within(lambda: ticket.__exit__(None, None, None))

    @rule(num_pages=st.sampled_from([6, 20, 1000]))
    def rebuild(self, num_pages: int) -> None:
        self.within(lambda: self.admission.set_capacity(capacity(num_pages)))

    @rule(target=tickets, principal=st.sampled_from(PRINCIPALS), count=st.integers(2, 6), pages=st.integers(1, 3))
    def come_in_a_burst(self, principal: str | None, count: int, pages: int) -> MultipleResults[Ticket | None]:
        return multiple(*(self.come_and_ask_now(principal, pages, pages) for _ in range(count)))

    @rule(numbers=st.lists(st.integers(0, 2), min_size=1, max_size=6))
    def finish(self, numbers: list[int]) -> None:
        for number in numbers:
            seated = [ticket for ticket in self.here if ticket.is_seated]
            if seated:
                self.leave_now(seated[number % len(seated)])
                self.nobody_starves()

    @rule(newcomer=st.sampled_from(PRINCIPALS))
    def close_and_open(self, newcomer: str | None) -> None:
        self.within(lambda: self.admission.close(lambda: ApiError("overloaded", "", code="shutting_down")))
        assert not any(self.queued(principal) for principal in PRINCIPALS)
        assert self.come(newcomer) is None
        self.admission.open()

    @invariant()
    def everything_is_accounted_for(self) -> None:
        admission = self.admission
        seated = [ticket for ticket in self.here if ticket.is_seated]
        waiting = [ticket for ticket in self.here if not ticket.is_seated and ticket.error is None]
        assert admission.in_flight == len(seated) <= self.seats
        assert admission.queue_depth == len(waiting)
        assert len(seated) + len(waiting) <= self.seats + PLACES
        assert admission.reserved_pages == sum(ticket.reserved_pages for ticket in seated)
        assert not any(ticket.reserved_pages for ticket in self.here if not ticket.is_seated)
        assert admission._unseen_pages == sum(ticket.unseen_pages for ticket in seated)
        assert all(0 <= ticket.unseen_pages <= ticket.reserved_pages for ticket in self.here)
        assert admission.anon_in_flight == sum(ticket.principal is None for ticket in seated) <= self.anon_seats
        assert admission.num_principals == len({ticket.principal for ticket in (*seated, *waiting)})

    @invariant()
    def nobody_waits_without_a_reason(self) -> None:
        """Where somebody waits there is no seat, or somebody waits for pages."""
        admission = self.admission
        ready = [t for t in self.here if not t.is_seated and t.error is None and t.need is not None]
        if all(t.principal is None for t in ready) and admission.anon_in_flight == self.anon_seats:
            return
        assert admission.capacity is not None
        num_pages = admission.capacity.num_pages
        needs = [min(t.need.expected, num_pages) for t in ready if t.need is not None]
        lacks_pages = any(admission.reserved_pages + need > num_pages for need in needs)
        assert not ready or admission.in_flight == self.seats or lacks_pages

    @invariant()
    def nobody_starves(self) -> None:
        """While a principal with nothing at work waits, every other one gets one turn at most."""
        seated = {ticket for ticket in self.here if ticket.is_seated}
        starving = {
            t.principal
            for t in self.here
            if not t.is_seated and t.error is None and t.need is not None and t.principal is not None
        } - {t.principal for t in seated}
        new = [ticket.principal for ticket in seated - self.seated]
        assert self.admission.capacity is not None
        within = self.admission.reserved_pages <= self.admission.capacity.num_pages
        assert not new or within or (self.free_pages is not None and self.admission._unseen_pages <= self.free_pages)
        self.seated = seated
        for principal in list(self.turns):
            if principal not in starving:
                del self.turns[principal]
                continue
            turns = self.turns[principal]
            for other in new:
                turns[other] = turns.get(other, 0) + 1
                assert other is not None and turns[other] == 1
        for principal in starving:
            self.turns.setdefault(principal, {})

    def teardown(self) -> None:
        """Everybody who may leaves, and everybody who waits gets a turn before that."""
        rounds = 0
        while any(ticket.is_seated for ticket in self.here):
            self.leave_now(next(ticket for ticket in self.here if ticket.is_seated))
            rounds += 1
            assert rounds <= self.seats + PLACES
        assert not any(t.need is not None and t.error is None for t in self.here), "somebody waits for ever"
        for ticket in list(self.here):
            self.leave_now(ticket)
        admission = self.admission
        assert not (admission.in_flight or admission.queue_depth or admission.reserved_pages)
        assert not (admission.num_principals or admission.anon_in_flight)
        self.loop.close()


AdmissionMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestAdmissionAccounting = AdmissionMachine.TestCase

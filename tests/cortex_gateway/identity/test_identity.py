"""Grants: whatever becomes of a request, nothing it reserved stays behind, and no cap is passed on the way."""

from __future__ import annotations

import asyncio
import contextlib

from cortex_core.entitlements import EntitlementsSection
from cortex_core.errors import ApiError
from cortex_core.fleet import ContextLimit
from cortex_gateway.identity.estimate import MeteredTokens
from cortex_gateway.identity.identity import Grant, Identity
from cortex_gateway.identity.store import Hold, MemoryStore, Refused, StoreError
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cortex_gateway.identity.harness import BODY, CAP, ENTRY, WINDOW

from .fake_clock import FakeClock


class SlowStore(MemoryStore):
    """Decides when a test says so, and sometimes loses the answer, before or after it was written."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(clock)
        self.waiting: list[tuple[Hold, asyncio.Future[str]]] = []

    async def reserve(self, hold: Hold) -> Refused | None:
        gate: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.waiting.append((hold, gate))
        how = await gate
        if how == "fails":
            raise StoreError("not written")
        refused = await super().reserve(hold)
        if how == "answer lost":
            raise StoreError("written, but who knows")
        return refused


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["ask", "decide", "fail", "lose", "cancel", "settle", "settle twice", "wait", "set"]),
        st.integers(0, 400),
    ),
    max_size=50,
)


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_no_reservation_outlives_its_request_and_no_cap_is_passed(steps: list[tuple[str, int]]) -> None:
    asyncio.run(_walk(steps))


async def _walk(steps: list[tuple[str, int]]) -> None:
    clock = FakeClock()
    store = SlowStore(clock)
    identity = Identity(
        EntitlementsSection(store="sqlite:unused", keys=(ENTRY,), reservation_ttl_s=3600),
        store,
        limit_of=lambda model: ContextLimit(context=WINDOW),
        cost_of=lambda model: None,
        clock=clock,
    )
    await identity.start()
    principal = await identity.authenticate([(b"x-api-key", b"secret")])
    assert principal is not None
    meters = principal.meters
    assert meters.tokens is not None and meters.requests is not None
    asking: list[asyncio.Task[Grant]] = []
    spent = 0

    async def turn() -> None:
        for _ in range(8):
            await asyncio.sleep(0)

    def grants() -> list[Grant]:
        done = [task for task in asking if task.done() and not task.cancelled() and task.exception() is None]
        return [task.result() for task in done]

    for what, number in steps:
        if what == "ask":
            asking.append(asyncio.ensure_future(identity.admit(principal, "m", "m", BODY, is_metered=True)))
        elif what in ("decide", "fail", "lose") and store.waiting:
            _, gate = store.waiting.pop(number % len(store.waiting))
            gate.set_result({"decide": "decides", "fail": "fails", "lose": "answer lost"}[what])
        elif what == "cancel" and asking:
            asking[number % len(asking)].cancel()
        elif what.startswith("settle") and (held := grants()):
            grant = held[number % len(held)]
            real = min(number, WINDOW)
            if not grant._is_settled:
                spent += real
            for _ in range(2 if "twice" in what else 1):
                grant.settle(MeteredTokens(prompt=real // 3, completion=real - real // 3))
        elif what == "wait":
            clock.pass_ms(number * 100)
        elif what == "set":
            clock.set_ms((number - 200) * 60_000)
        await turn()
        for task in asking:
            if task.done() and not task.cancelled() and task.exception() is not None:
                assert isinstance(task.exception(), ApiError)
        live = sum(not grant._is_settled for grant in grants())
        assert spent + live * WINDOW <= CAP
        assert 0 <= meters.in_flight <= 6
        assert meters.requests.used(clock.elapsed_ms()) <= 50
        assert meters.tokens.used(clock.elapsed_ms()) + meters.tokens.reserved <= 2000

    for _, gate in store.waiting:
        gate.set_result("decides")
    for task in asking:
        with contextlib.suppress(ApiError, asyncio.CancelledError):
            (await task).settle(MeteredTokens(0, 0))
    await turn()
    await identity.bookkeeper.written()
    assert (meters.in_flight, meters.tokens.reserved, identity.bookkeeper.num_live) == (0, 0, 0)
    assert not store._holds
    assert sum(used.amount for used in await store.usage()) == spent
    await identity.stop()

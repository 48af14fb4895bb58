"""H11: clocks that are set. No cap is given twice for it, and nobody is locked out for longer than a window."""

from __future__ import annotations

import asyncio
import itertools
import json
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from cortex_core.catalogue import Catalogue
from cortex_core.entitlements import Budget, EntitlementsSection, KeyEntry, Window
from cortex_core.errors import ApiError
from cortex_core.fleet import ContextLimit
from cortex_gateway.identity.identity import Identity
from cortex_gateway.identity.sqlite_store import SqliteStore
from cortex_gateway.identity.store import Hold, MemoryStore, Refused, Settlement, Share, Store
from cortex_gateway.identity.windows import Slots
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cortex_gateway.fake_neuron import FakeNeuron
from tests.cortex_gateway.gateway_client import MODEL, Start
from tests.cortex_gateway.identity.harness import HOUR

from .fake_clock import NOW, FakeClock, Time, Used
from .postgres_server import PostgresAt, PostgresServer
from .test_gateway import CHAT, bearer, key

TTL = 60_000
CAP = 20_000
WINDOWS = {
    "balance": Window(),
    "fixed": Window("fixed", 3600),
    "rolling": Window("rolling", 3600),
}


def share(window: Window, amount: int) -> tuple[Share, ...]:
    budget = Budget(tokens=CAP, window=window)
    return (Share(budget.name, Slots.of(window), CAP, amount),)


class Gateway:
    """One gateway's side of a shared store, on a host of its own or not."""

    numbers = itertools.count()

    def __init__(self, store: Store, clock: FakeClock, window: Window) -> None:
        self.store, self.clock, self.window = store, clock, window
        self.owner = f"gateway {next(self.numbers)}"
        self.held: dict[str, int] = {}

    async def reserve(self, amount: int) -> Refused | None:
        hold = Hold(f"hold {next(self.numbers)}", "ci", self.owner, TTL, share(self.window, amount))
        refused = await self.store.reserve(hold)
        if refused is None:
            self.held[hold.hold_id] = amount
        return refused

    async def settle(self, number: int) -> int:
        name = sorted(self.held)[number % len(self.held)]
        amount = self.held.pop(name)
        await self.store.settle([Settlement(name, "ci", share(self.window, amount))])
        return amount


# ---------------------------------------------------------------------------------------------- any history

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["reserve", "reserve", "settle", "pass", "set", "set by an hour", "restart", "die"]),
        st.integers(0, 1),  # which gateway
        st.integers(0, 12_000),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(STEPS, st.sampled_from(sorted(WINDOWS)), st.sampled_from([0, 1_800_000, -HOUR, 86_400_000]))
def test_H11_whatever_becomes_of_the_clocks_no_cap_is_passed_and_none_is_kept_for_longer_than_its_window(
    steps: list[tuple[str, int, int]], kind: str, skew_ms: int
) -> None:
    """Two gateways on one file, whose clocks may differ, are set, and who are restarted or killed in between."""
    with tempfile.TemporaryDirectory(prefix="cortex-clock-") as folder:
        asyncio.run(_history(steps, WINDOWS[kind], skew_ms, Path(folder) / "cortex.db"))


async def _history(steps: list[tuple[str, int, int]], window: Window, skew_ms: int, path: Path) -> None:
    passed = Time()
    clocks = [FakeClock(passed), FakeClock(passed, ahead_ms=skew_ms)]

    async def opened(number: int) -> Gateway:
        store = SqliteStore(path, clocks[number])
        await store.open()
        return Gateway(store, clocks[number], window)

    gateways = [await opened(0), await opened(1)]
    used: list[Used] = []
    boundaries: list[int] = []  # when time, and nobody's hand, moved the calendar into another fixed window
    orphans: list[tuple[int, int]] = []  # what the dead had reserved, and until when that counts

    async def let_pass(milliseconds: int) -> None:
        slots = Slots.of(window)
        before = {gateway: (await gateway.store.moment()).calendar_ms for gateway in gateways}
        passed.passed_ms += milliseconds
        if slots.is_fixed and any(slots.at(then) != slots.at(then + milliseconds) for then in before.values()):
            boundaries.append(passed.passed_ms)
        for gateway in gateways:
            await gateway.store.renew(gateway.owner, TTL)

    for what, which, number in steps:
        gateway = gateways[which]
        if what == "reserve":
            await gateway.reserve(number)
        elif what == "settle" and gateway.held:
            used.append(Used(passed.passed_ms, await gateway.settle(number)))
        elif what == "pass":
            for _ in range(number % 7):
                await let_pass(20_000 + number * 50)
        elif what == "set":
            gateway.clock.set_ms((number - 6_000) * 100_000)  # up to a week
        elif what == "set by an hour":
            gateway.clock.set_ms(HOUR if number % 2 else -HOUR)
        elif what in ("restart", "die"):
            if what == "restart":
                while gateway.held:
                    used.append(Used(passed.passed_ms, await gateway.settle(0)))
            orphans += [(passed.passed_ms + TTL, amount) for amount in gateway.held.values()]
            await gateway.store.close()
            gateways[which] = await opened(which)
        live = sum(sum(each.held.values()) for each in gateways)
        live += sum(amount for until, amount in orphans if until > passed.passed_ms)
        if window.kind == "balance":
            inside, resets = used, 0
        else:
            since = passed.passed_ms - window.seconds * 1000
            inside = [each for each in used if each.at > since]
            resets = len({moment for moment in boundaries if moment > since})
        assert sum(each.amount for each in inside) + live <= CAP * (1 + resets)

    for gateway in gateways:
        while gateway.held:
            await gateway.settle(0)
    if window.kind != "balance":
        passed.passed_ms += window.seconds * 1000 + 2 * Slots.of(window).slot_ms % HOUR + TTL
        for gateway in gateways:
            assert await gateway.reserve(CAP) is None, "the window is over"
            await gateway.store.settle([Settlement(name, "ci", share(window, 0)) for name in gateway.held])
    for gateway in gateways:
        await gateway.store.close()


# ---------------------------------------------------------------------------------------------- every store

Open = Callable[[FakeClock], Awaitable[Store]]


@pytest.fixture(params=["memory", "sqlite", "postgres"])
async def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """`await open_store(clock)` -> a further gateway's view of the same keys and budgets."""
    opened: list[Store] = []
    memory: list[MemoryStore] = []
    url = request.getfixturevalue("postgres").new_url() if request.param == "postgres" else ""
    date: list[FakeClock] = []

    async def open_(clock: FakeClock) -> Store:
        date.append(clock)
        store: Store
        if request.param == "memory":  # nobody shares it
            store = memory[0] if memory else MemoryStore(clock)
            memory.append(store)
        elif request.param == "sqlite":
            store = SqliteStore(tmp_path / "cortex.db", clock)
        else:
            store = PostgresAt(url, clock, date[0])
        await store.open()
        opened.append(store)
        return store

    yield open_
    for store in opened:
        await store.close()


@pytest.mark.parametrize("kind", sorted(WINDOWS))
async def test_H11_a_clock_one_hour_ahead_lets_no_reservation_expire(open_store: Open, kind: str) -> None:
    """The case: what was in flight was taken for abandoned, and 28,270 of a cap of 20,000 were booked."""
    clock = FakeClock()
    gateway = Gateway(await open_store(clock), clock, WINDOWS[kind])
    for _ in range(4):
        assert await gateway.reserve(5_000) is None
    clock.set_ms(HOUR)
    for owner in (gateway.owner, "another"):
        gateway.owner = owner
        refused = await gateway.reserve(1)
        assert refused is not None and refused.shortfall.reserved == CAP
    total = 0
    while gateway.held:
        total += await gateway.settle(0)
    assert total == sum(used.amount for used in await gateway.store.usage()) == CAP
    refused = await gateway.reserve(1)
    assert refused is not None and refused.shortfall.used == CAP, "nor is a window over that an hour was cut out of"


@pytest.mark.parametrize("kind", ["fixed", "rolling"])
@pytest.mark.parametrize("back_ms", [HOUR, 30 * 86_400_000])
async def test_H11_a_clock_that_is_set_back_locks_nobody_out_for_longer_than_the_window(
    open_store: Open, kind: str, back_ms: int
) -> None:
    clock = FakeClock()
    gateway = Gateway(await open_store(clock), clock, WINDOWS[kind])
    assert await gateway.reserve(CAP) is None
    await gateway.settle(0)
    clock.set_ms(-back_ms)
    refused = await gateway.reserve(1)
    assert refused is not None and refused.shortfall.wait_ms is not None
    assert refused.shortfall.wait_ms <= HOUR + 120_000, "and what is advised is no longer either"
    clock.pass_ms(refused.shortfall.wait_ms)
    assert await gateway.reserve(CAP) is None


@pytest.mark.parametrize("kind", sorted(WINDOWS))
@pytest.mark.parametrize("jump_ms", [HOUR, -HOUR])
async def test_H11_a_gateway_that_is_killed_and_comes_back_after_the_jump_goes_on_counting(
    open_store: Open, kind: str, jump_ms: int
) -> None:
    clock = FakeClock()
    before = Gateway(await open_store(clock), clock, WINDOWS[kind])
    assert await before.reserve(8_000) is None
    await before.settle(0)
    assert await before.reserve(7_000) is None  # and it is killed
    clock.set_ms(jump_ms)
    after = Gateway(await open_store(clock), clock, WINDOWS[kind])
    refused = await after.reserve(5_001)
    assert refused is not None
    assert (refused.shortfall.used, refused.shortfall.reserved) == (8_000, 7_000)
    clock.pass_ms(TTL)
    refused = await after.reserve(12_001)
    assert refused is not None and refused.shortfall.reserved == 0, "the dead gateway's hold has lived its minute"


async def test_H11_a_jump_back_and_forth_over_the_end_of_a_fixed_window_gives_no_second_cap(open_store: Open) -> None:
    clock = FakeClock()
    clock.set_ms(HOUR - (NOW % HOUR) - 60_000)  # a minute before the hour
    gateway = Gateway(await open_store(clock), clock, WINDOWS["fixed"])
    assert await gateway.reserve(CAP) is None
    await gateway.settle(0)
    for jump_ms in (120_000, -120_000) * 4:
        clock.set_ms(jump_ms)
        assert await gateway.reserve(1) is not None
    clock.pass_ms(60_001)
    assert await gateway.reserve(1) is None, "but time that passes does"


@pytest.mark.parametrize("kind", sorted(WINDOWS))
async def test_H11_gateways_whose_hosts_disagree_keep_one_cap(
    kind: str, postgres: PostgresServer, tmp_path: Path
) -> None:
    """An hour apart; on PostgreSQL on hosts of their own, which have nothing in common but the database."""
    passed = Time()
    one, other = FakeClock(passed), FakeClock(passed, ahead_ms=HOUR, boot="boot 2")
    url = postgres.new_url()
    same_host = FakeClock(passed, ahead_ms=HOUR)
    date = FakeClock(passed, ahead_ms=-7 * HOUR)
    for stores in (
        [(SqliteStore(tmp_path / "cortex.db", one), one), (SqliteStore(tmp_path / "cortex.db", same_host), same_host)],
        [(PostgresAt(url, one, date), one), (PostgresAt(url, other, date), other)],
    ):
        gateways = [Gateway(store, clock, WINDOWS[kind]) for store, clock in stores]
        for gateway in gateways:
            await gateway.store.open()
        first, second = gateways
        assert await first.reserve(12_000) is None
        assert await second.reserve(8_000) is None
        assert await first.reserve(1) is not None and await second.reserve(1) is not None
        assert await first.settle(0) == 12_000
        refused = await second.reserve(1)
        assert refused is not None and refused.shortfall[1:3] == (12_000, 8_000)
        passed.passed_ms += TTL - 1
        assert (await first.reserve(1)) is not None, "the other's hold lives as long as it should"
        passed.passed_ms += 1
        assert (await first.reserve(8_000)) is None, "and no longer"
        for gateway in gateways:
            await gateway.store.close()


async def test_H11_two_clocks_on_one_file_make_one_calendar(tmp_path: Path) -> None:
    """Half an hour apart, each would end the window at its own full hour, and an hour would have two ends."""
    passed = Time()
    clocks = [FakeClock(passed), FakeClock(passed, ahead_ms=HOUR // 2)]
    gateways = [Gateway(SqliteStore(tmp_path / "cortex.db", clock), clock, WINDOWS["fixed"]) for clock in clocks]
    for gateway in gateways:
        await gateway.store.open()
    spent_at = []
    for minute in range(180):
        for gateway in gateways if minute // 2 % 2 else gateways[::-1]:
            if await gateway.reserve(CAP) is None:
                await gateway.settle(0)
                spent_at.append(minute)
        passed.passed_ms += 60_000
    assert len(spent_at) in (3, 4)
    assert {later - earlier for earlier, later in itertools.pairwise(spent_at[1:])} == {60}
    for gateway in gateways:
        await gateway.store.close()


async def test_H11_a_database_whose_clock_is_set_is_noticed_by_whoever_asks_first(postgres: PostgresServer) -> None:
    passed = Time()
    date = FakeClock(passed)
    url = postgres.new_url()
    gateways = [
        Gateway(PostgresAt(url, clock, date), clock, WINDOWS["fixed"])
        for clock in (FakeClock(passed), FakeClock(passed, boot="boot 2"))
    ]
    for gateway in gateways:
        await gateway.store.open()
        assert await gateway.reserve(5_000) is None
        await gateway.settle(0)
    for jump_ms in (HOUR, -3 * HOUR, 86_400_000):
        date.set_ms(jump_ms)
        found = await asyncio.gather(*(gateway.reserve(10_001) for gateway in gateways for _ in range(4)))
        assert {refused.shortfall.used for refused in found if refused is not None} == {10_000}
        assert len(await gateways[0].store.usage()) == 1
    for gateway in gateways:
        await gateway.store.close()


def entry(**limits: Any) -> KeyEntry:
    return KeyEntry(key_id="ci", key="secret", **limits)


@pytest.mark.parametrize("limits", [{"requests_per_minute": 2}, {"tokens_per_minute": 2_000}])
@pytest.mark.parametrize("jump_ms", [HOUR, -HOUR, 40 * 86_400_000])
async def test_H11_the_rates_of_a_key_know_nothing_of_the_date(limits: dict[str, int], jump_ms: int) -> None:
    clock = FakeClock()
    identity = Identity(
        EntitlementsSection(keys=(entry(**limits),)),
        MemoryStore(clock),
        limit_of=lambda model: ContextLimit(context=1_000),
        cost_of=lambda model: None,
        clock=clock,
    )
    await identity.start()
    principal = await identity.authenticate([(b"x-api-key", b"secret")])
    assert principal is not None
    body = json.dumps({"model": "m", "max_tokens": 1_000}).encode()

    async def refused() -> int | None:
        try:
            await identity.admit(principal, "m", "m", body, is_metered=True)
        except ApiError as error:
            return error.retry_after
        return None

    assert await refused() is None
    clock.pass_ms(30_000)
    if "requests_per_minute" in limits:
        assert await refused() is None
    else:
        meter = principal.meters.tokens
        assert meter is not None
        meter.settle(meter.reserved, 2_000, clock.elapsed_ms())
    clock.set_ms(jump_ms)
    wait_s = await refused()
    assert wait_s is not None and wait_s <= 62
    clock.pass_ms(61_000)
    assert await refused() is None
    await identity.stop()


@pytest.mark.parametrize("jump_s", [3600, -3600])
async def test_H11_requests_in_flight_through_a_jump_never_book_more_than_the_cap(
    neuron: FakeNeuron, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump_s: int
) -> None:
    """On real sockets: ten requests of 2,000 tokens are in flight, the date is set, and ten more come."""
    neuron.have(MODEL, limit={"context": 2_000, "output": 2_000})
    neuron.answer_gate.clear()
    budgets = [{"tokens": CAP, "window": {"kind": "rolling", "seconds": 3600}}]
    client = await start(
        neuron,
        catalogue=Catalogue(),
        entitlements={
            "store": f"sqlite:{tmp_path}/cortex.db",
            "keys": [key(budgets=budgets, requests_per_minute=12)],
            "reservation_ttl_s": 60.0,
        },
    )
    body = {"model": MODEL, "messages": [], "max_tokens": 2_000}

    async def ask() -> tuple[int, str, int]:
        async with client.post(CHAT, body, headers=bearer()) as response:
            document = json.loads(await response.read())
            error = document.get("error", {})
            return response.status, error.get("code", ""), int(response.headers.get("retry-after", 0))

    asking = [asyncio.ensure_future(ask()) for _ in range(10)]
    async with asyncio.timeout(30):
        while len(neuron.requests) < 10:
            await asyncio.sleep(0.01)
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() + jump_s * 1_000_000_000)
    refused = [await ask() for _ in range(2)]
    assert {status for status, _, _ in refused} == {429}
    assert len(neuron.requests) == 10
    # The requests of its minute are counted in any case, and how long to wait is no longer than that.
    status, code, retry_after = await ask()
    assert (status, code) == (429, "rate_limit_exceeded") and 1 <= retry_after <= 62
    neuron.answer_gate.set()
    assert {status for status, _, _ in await asyncio.gather(*asking)} == {200}


def test_H11_keys_expire_by_the_calendar_and_a_clock_that_was_wrong_takes_none_away() -> None:
    asyncio.run(_expiry())


async def _expiry() -> None:
    from cortex_gateway.identity.store import KeyRecord

    clock = FakeClock()
    store = MemoryStore(clock)
    await store.add_key(KeyRecord(entry(), NOW, expires_ms=NOW + HOUR))
    identity = Identity(
        EntitlementsSection(), store, limit_of=lambda model: None, cost_of=lambda model: None, clock=clock
    )
    clock.set_ms(86_400_000)  # wrong when the gateway begins
    await identity.start()

    async def is_valid() -> bool:
        return await identity.authenticate([(b"x-api-key", b"secret")]) is not None

    assert not await is_valid()
    clock.set_ms(-86_400_000)
    assert await is_valid()
    clock.pass_ms(HOUR)
    assert not await is_valid()
    await identity.stop()

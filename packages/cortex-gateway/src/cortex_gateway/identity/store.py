"""Storage of keys and of the use of their budgets, behind one interface: what must outlive a gateway.

Budgets are decided where their state lives (so that several gateways cannot overshoot one together): `reserve` reads
and writes in one transaction, and the arithmetic of the decision is `decide`, the same for every store. A reservation
belongs to its gateway's `owner` id and expires unless renewed, so that those of a dead gateway give way by themselves;
its own gateway counts it until it is settled, however late. What time it is is the store's to say, `store_time`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import msgspec
from cortex_core.entitlements import KeyEntry

from cortex_gateway.identity.clock import SYSTEM_CLOCK, Clock
from cortex_gateway.identity.store_time import Kept, Moment, Reading, Timekeeper, carried
from cortex_gateway.identity.windows import Shortfall, Slots, shortfall

FORGET_HOLDS_AFTER_MS = 86_400_000
"""A reservation that expired is not counted, but stays so long: its gateway may have been slow, not dead."""


class StoreError(Exception):
    """The store cannot be asked. What it would have decided is refused, retryably."""


class KeyExists(Exception):
    """A key of this id or this secret is there already."""


class KeyRecord(msgspec.Struct, frozen=True):
    """A key as it is kept: `entry.hash` is set, `entry.key` never is. Times are dates, in milliseconds since 1970."""

    entry: KeyEntry
    created_ms: int
    expires_ms: int | None = None
    revoked_ms: int | None = None

    def is_valid(self, now_ms: int) -> bool:
        return self.revoked_ms is None and (self.expires_ms is None or now_ms < self.expires_ms)


class Share(NamedTuple):
    """One budget's part of a reservation or a settlement; amount in the budget's unit."""

    budget: str
    slots: Slots
    cap: int
    amount: int


class Hold(NamedTuple):
    """A reservation over all budgets of a key: all of it or none. ttl_ms: how long it lives without being renewed."""

    hold_id: str
    key_id: str
    owner: str
    ttl_ms: int
    shares: tuple[Share, ...]


class Settlement(NamedTuple):
    """What came of a hold: its shares with the amounts that were used. Settling twice has no effect."""

    hold_id: str
    key_id: str
    shares: tuple[Share, ...]


class Refused(NamedTuple):
    """A reservation that a budget has no room for, and what it lacks."""

    budget: str
    shortfall: Shortfall


class BookedUse(NamedTuple):
    """Use of a key's budget in one slot of time."""

    key_id: str
    budget: str
    slot: int
    amount: int


class Store(Protocol):
    """Every method may raise `StoreError`."""

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def version(self) -> int:
        """Another number whenever a key was added or revoked."""
        ...

    async def keys(self) -> list[KeyRecord]: ...

    async def add_key(self, record: KeyRecord) -> None:
        """Raises `KeyExists`."""
        ...

    async def revoke_key(self, key_id: str, now_ms: int) -> bool:
        """False if there is no such key, or none that is not revoked already."""
        ...

    async def moment(self) -> Moment:
        """What time it is there."""
        ...

    async def reserve(self, hold: Hold) -> Refused | None: ...

    async def settle(self, settlements: Sequence[Settlement]) -> None: ...

    async def renew(self, owner: str, ttl_ms: int) -> None:
        """Keep all of an owner's holds, those too that have expired meanwhile, and forget what expired long ago."""
        ...

    async def usage(self) -> list[BookedUse]: ...


def decide(
    shares: Iterable[Share], booked: Iterable[tuple[str, int, int]], reserved: Mapping[str, int], moment: Moment
) -> Refused | None:
    """None if every share fits its budget. booked are (budget, slot, amount), reserved sums by budget."""
    by_budget: dict[str, list[tuple[int, int]]] = {}
    for budget, slot, amount in booked:
        by_budget.setdefault(budget, []).append((slot, amount))
    for share in shares:
        found = shortfall(
            share.slots,
            share.cap,
            by_budget.get(share.budget, ()),
            reserved.get(share.budget, 0),
            share.amount,
            moment.of(share.slots),
        )
        if found is not None:
            return Refused(share.budget, found)
    return None


class MemoryStore:
    """Nothing outlives it: keys come from the configuration file, and budgets are refused there.

    It keeps to the whole interface all the same: it is what the other stores are compared with.
    """

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        self._time = Timekeeper()
        self._kept: Kept | None = None
        self._keys: dict[str, KeyRecord] = {}
        self._version = 0
        self._holds: dict[str, tuple[Hold, int]] = {}
        self._booked: dict[tuple[str, str, int], int] = {}

    async def open(self) -> None:
        self._now()

    async def close(self) -> None:
        pass

    async def version(self) -> int:
        return self._version

    async def keys(self) -> list[KeyRecord]:
        return list(self._keys.values())

    async def add_key(self, record: KeyRecord) -> None:
        digests = {known.entry.digest for known in self._keys.values()}
        if record.entry.name in self._keys or record.entry.digest in digests:
            raise KeyExists(record.entry.name)
        self._keys[record.entry.name] = record
        self._version += 1

    async def revoke_key(self, key_id: str, now_ms: int) -> bool:
        record = self._keys.get(key_id)
        if record is None or record.revoked_ms is not None:
            return False
        self._keys[key_id] = msgspec.structs.replace(record, revoked_ms=now_ms)
        self._version += 1
        return True

    async def moment(self) -> Moment:
        return self._now()

    def _now(self) -> Moment:
        clock = self._clock
        told = self._time.tell(self._kept, Reading(clock.wall_ms(), clock.elapsed_ms(), clock.boot))
        if told.carried_from is not None:
            booked, self._booked = self._booked, {}
            for (key_id, budget, slot), amount in booked.items():
                if (now := carried(budget, slot, told)) is not None:
                    self._book(key_id, budget, now, amount)
        self._kept = told.kept
        self._time.agree(told)
        return told.moment

    def _book(self, key_id: str, budget: str, slot: int, amount: int) -> None:
        place = (key_id, budget, slot)
        self._booked[place] = self._booked.get(place, 0) + amount

    async def reserve(self, hold: Hold) -> Refused | None:
        now = self._now()
        booked = [(budget, slot, amount) for (key, budget, slot), amount in self._booked.items() if key == hold.key_id]
        reserved: dict[str, int] = {}
        for other, expires_ms in self._holds.values():
            if other.key_id == hold.key_id and (expires_ms > now.steady_ms or other.owner == hold.owner):
                for share in other.shares:
                    reserved[share.budget] = reserved.get(share.budget, 0) + share.amount
        refused = decide(hold.shares, booked, reserved, now)
        if refused is None:
            self._holds[hold.hold_id] = (hold, now.steady_ms + hold.ttl_ms)
        return refused

    async def settle(self, settlements: Sequence[Settlement]) -> None:
        now = self._now()
        for settlement in settlements:
            if self._holds.pop(settlement.hold_id, None) is None:
                continue
            for share in settlement.shares:
                self._book(settlement.key_id, share.budget, share.slots.at(now.of(share.slots)), share.amount)

    async def renew(self, owner: str, ttl_ms: int) -> None:
        now_ms = self._now().steady_ms
        for hold, expires_ms in list(self._holds.values()):
            if hold.owner == owner:
                self._holds[hold.hold_id] = (hold, now_ms + ttl_ms)
            elif expires_ms < now_ms - FORGET_HOLDS_AFTER_MS:
                del self._holds[hold.hold_id]

    async def usage(self) -> list[BookedUse]:
        return [BookedUse(key, budget, slot, amount) for (key, budget, slot), amount in self._booked.items()]

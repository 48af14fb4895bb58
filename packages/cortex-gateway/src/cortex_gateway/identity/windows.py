"""Use over time, counted in slots. Pure: integers only, the time comes in.

One mechanism serves requests per minute, tokens per minute and budgets of every kind. Use is booked into slots of
equal length; a window counts a run of slots up to the present one. What is reserved counts in full until it is
settled, whatever the time. As a slot is dropped only when all of it lies outside, a rolling window counts a little
too much (at most one slot) and never too little, so in no window of the promised length can more than the cap be
used.

Times are milliseconds on a clock that is never set (fixed windows: on the calendar of their store), amounts have the
unit of their cap.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from cortex_core.entitlements import Window

ROLLING_SLOTS = 60
"""Slots of a rolling window: it forgets in steps of a sixtieth."""

IN_FLIGHT_WAIT_MS = 1000
"""Advice where only requests in flight are in the way: they settle at any moment."""


class Slots(NamedTuple):
    """How a window is cut. slot_ms 0 is one slot for ever; num_slots are counted, the present one included."""

    slot_ms: int
    num_slots: int

    @classmethod
    def of(cls, window: Window) -> Slots:
        if window.kind == "balance":
            return cls(0, 1)
        if window.kind == "fixed":
            return cls(window.seconds * 1000, 1)
        return cls(-(-window.seconds * 1000 // ROLLING_SLOTS), ROLLING_SLOTS + 1)

    @property
    def is_fixed(self) -> bool:
        """Whether it begins anew at hours of the calendar."""
        return self.slot_ms > 0 and self.num_slots == 1

    def at(self, now_ms: int) -> int:
        """The slot that use of this moment is booked into."""
        return now_ms // self.slot_ms if self.slot_ms else 0

    def oldest(self, now_ms: int) -> int:
        """The first slot that still counts."""
        return self.at(now_ms) - self.num_slots + 1

    def leaves_at_ms(self, slot: int) -> int:
        """The moment from which `slot` counts no more; of no meaning where slot_ms is 0."""
        return (slot + self.num_slots) * self.slot_ms


class Shortfall(NamedTuple):
    """Why an amount does not fit. wait_ms: until it would, None for never."""

    cap: int
    used: int
    reserved: int
    amount: int
    wait_ms: int | None


def shortfall(
    slots: Slots, cap: int, booked: Iterable[tuple[int, int]], reserved: int, amount: int, now_ms: int
) -> Shortfall | None:
    """None if `amount` fits beside what is used and reserved.

    booked are (slot, amount) in any order; those outside the window are ignored, those ahead of it are of now.
    """
    oldest, newest = slots.oldest(now_ms), slots.at(now_ms)
    counted = sorted((min(slot, newest), booked_amount) for slot, booked_amount in booked if slot >= oldest)
    used = sum(booked_amount for _, booked_amount in counted)
    excess = used + reserved + amount - cap
    if excess <= 0:
        return None
    wait_ms: int | None = None
    if amount <= cap:
        if excess <= reserved:
            wait_ms = IN_FLIGHT_WAIT_MS
        elif slots.slot_ms:
            for slot, booked_amount in counted:
                excess -= booked_amount
                if excess <= reserved:
                    wait_ms = slots.leaves_at_ms(slot) - now_ms
                    break
    return Shortfall(cap, used, reserved, amount, wait_ms)


class Meter:
    """A window in memory: what a gateway counts by itself."""

    __slots__ = ("_booked", "_slots", "_used", "cap", "reserved")

    def __init__(self, cap: int, window: Window) -> None:
        self.cap = cap
        self.reserved = 0
        self._slots = Slots.of(window)
        self._booked: deque[tuple[int, int]] = deque()
        self._used = 0

    def used(self, now_ms: int) -> int:
        booked, oldest = self._booked, self._slots.oldest(now_ms)
        while booked and booked[0][0] < oldest:
            self._used -= booked.popleft()[1]
        return self._used

    def remaining(self, now_ms: int) -> int:
        return max(0, self.cap - self.used(now_ms) - self.reserved)

    def reset_ms(self, now_ms: int) -> int:
        """Until nothing of what is booked now counts any more."""
        self.used(now_ms)
        return self._slots.leaves_at_ms(self._booked[-1][0]) - now_ms if self._booked and self._slots.slot_ms else 0

    def refuses(self, amount: int, now_ms: int) -> Shortfall | None:
        if self.used(now_ms) + self.reserved + amount <= self.cap:
            return None
        return shortfall(self._slots, self.cap, self._booked, self.reserved, amount, now_ms)

    def reserve(self, amount: int) -> None:
        """Whoever calls has asked `refuses` in the same breath, and will `settle` the same amount once."""
        self.reserved += amount

    def settle(self, reserved: int, amount: int, now_ms: int) -> None:
        """Give back a reservation and book what was used, which may be more or less."""
        self.reserved -= reserved
        if amount <= 0:
            return
        booked, slot = self._booked, self._slots.at(now_ms)
        if booked and booked[-1][0] >= slot:  # `>`: the clock was set back
            last, before = booked.pop()
            booked.append((last, before + amount))
        else:
            booked.append((slot, amount))
        self._used += amount

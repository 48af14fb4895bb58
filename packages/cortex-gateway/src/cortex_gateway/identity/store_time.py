"""The time of a store: one for all gateways that share it, whatever becomes of the clocks of their hosts. Pure.

Rolling windows and reservations are about time that passes. They are kept in *steady* time, which began as the date
and goes on by what has elapsed: a clock that is set moves it not at all. Fixed windows begin at the hours and days of
the calendar, so they follow the date (*calendar* time); when that jumps, what counted before is carried into the
window that is now, so that a jump forward gives nobody a second cap and one back locks nobody out for longer than a
window.

The store keeps one row, `Kept`. How much has elapsed since it was written is known to every process of the same boot,
and to every process that has been there before; only where nobody was does the difference of the dates have to do.
"""

from __future__ import annotations

from typing import NamedTuple

from cortex_core.entitlements import Window

from cortex_gateway.identity.windows import Slots

JUMP_MS = 5_000
"""Less than this is the way of clocks (and of answers on a network), more is a clock that was set."""

KEEP_EVERY_MS = 60_000
"""How old the row may become while the store is in use: hosts' clocks drift apart in between."""


class Kept(NamedTuple):
    """The store's row. elapsed_ms and boot are of whoever wrote it."""

    steady_ms: int
    calendar_ms: int
    elapsed_ms: int
    boot: str


class Reading(NamedTuple):
    """The clocks at one moment. wall_ms is the date of the store's authority: its own server, or its host."""

    wall_ms: int
    elapsed_ms: int
    boot: str


class Moment(NamedTuple):
    """Milliseconds since 1970, in both of a store's times."""

    steady_ms: int
    calendar_ms: int

    def of(self, slots: Slots) -> int:
        """The time that a window of this kind runs on."""
        return self.calendar_ms if slots.is_fixed else self.steady_ms


class Told(NamedTuple):
    """What a timekeeper says. carried_from: the calendar's time until now, where it jumped, or where this process sees
    the store for the first time: then every row of use has to be `carried`, and the row to be written. is_due: the
    row should be written soon."""

    moment: Moment
    kept: Kept
    carried_from: int | None
    is_due: bool
    reading: Reading


class Timekeeper:
    """One process' knowledge of one store's time."""

    def __init__(self) -> None:
        self._last: Told | None = None

    def tell(self, kept: Kept | None, reading: Reading) -> Told:
        """kept: the row, None if there is none yet. Changes nothing: whoever acts on it calls `agree` afterwards."""
        if kept is None:
            first = Moment(reading.wall_ms, reading.wall_ms)
            return Told(first, _kept(first, reading), reading.wall_ms, True, reading)
        since_ms = self._since(kept, reading)
        steady_ms, calendar_ms = kept.steady_ms + since_ms, kept.calendar_ms + since_ms
        carried_from = None
        if abs(reading.wall_ms - calendar_ms) <= JUMP_MS:
            calendar_ms = reading.wall_ms
        elif self._last is None or _is_set(self._last.reading, reading):
            carried_from, calendar_ms = calendar_ms, reading.wall_ms
        # Else this host's clock is another than the calendar, as it was before: one calendar is enough for all.
        if self._last is None and carried_from is None:
            carried_from = calendar_ms  # nothing jumped, but slots may lie ahead that an older release has booked
        moment = Moment(steady_ms, calendar_ms)
        is_due = since_ms >= KEEP_EVERY_MS or carried_from is not None
        return Told(moment, _kept(moment, reading), carried_from, is_due, reading)

    def agree(self, told: Told) -> None:
        """It has been acted upon: a jump in it is over."""
        self._last = told

    def _since(self, kept: Kept, reading: Reading) -> int:
        if kept.boot and kept.boot == reading.boot:
            return max(0, reading.elapsed_ms - kept.elapsed_ms)
        if self._last is not None:
            own_ms = self._last.moment.steady_ms + reading.elapsed_ms - self._last.reading.elapsed_ms
            return max(0, own_ms - kept.steady_ms)
        return max(0, reading.wall_ms - kept.calendar_ms)


def carried(budget: str, slot: int, told: Told) -> int | None:
    """The slot that use of `slot` belongs into after a jump; None where it had ceased to count before."""
    slots = _slots_of(budget)
    if slots is None or not slots.slot_ms:
        return slot
    now = slots.at(told.moment.of(slots))
    if not slots.is_fixed:
        return min(slot, now)
    if told.carried_from is not None and slot < slots.at(told.carried_from):
        return None
    return now


def _is_set(before: Reading, now: Reading) -> bool:
    """Whether the date moved otherwise than time passed."""
    return abs((now.wall_ms - before.wall_ms) - (now.elapsed_ms - before.elapsed_ms)) > JUMP_MS


def _kept(moment: Moment, reading: Reading) -> Kept:
    return Kept(moment.steady_ms, moment.calendar_ms, reading.elapsed_ms, reading.boot)


def _slots_of(budget: str) -> Slots | None:
    """How the window is cut of which `Budget.name` speaks; None for a name that no release ever wrote."""
    _, kind, *rest = (*budget.split("/"), "", "")
    seconds = rest[0]
    if kind == "balance":
        return Slots.of(Window(kind="balance"))
    if kind not in ("fixed", "rolling") or not (seconds.isascii() and seconds.isdigit()) or int(seconds) < 1:
        return None
    return Slots.of(Window(kind="fixed" if kind == "fixed" else "rolling", seconds=int(seconds)))

"""Time as a store keeps it: by what has elapsed, whatever becomes of the clocks."""

from __future__ import annotations

import pytest
from cortex_core.entitlements import Budget, Window
from cortex_gateway.identity.store_time import KEEP_EVERY_MS, Kept, Moment, Reading, Timekeeper, Told, carried
from cortex_gateway.identity.windows import Slots

from tests.cortex_gateway.identity.harness import HOUR

from .fake_clock import NOW


def test_H11_steady_time_goes_on_by_what_has_elapsed_whatever_the_date() -> None:
    keeper = Timekeeper()
    first = keeper.tell(None, Reading(NOW, 7, "boot"))
    keeper.agree(first)
    told = keeper.tell(first.kept, Reading(NOW + HOUR + 10, 17, "boot"))
    assert told.moment == Moment(NOW + 10, NOW + HOUR + 10) and told.carried_from == NOW + 10
    again = keeper.tell(first.kept, Reading(NOW + HOUR + 20, 27, "boot"))
    assert again.carried_from is not None, "what nobody has acted upon is told again"
    keeper.agree(again)
    assert keeper.tell(again.kept, Reading(NOW + HOUR + 30, 37, "boot")).carried_from is None


def test_H11_after_another_boot_only_the_date_says_how_long_the_host_was_away() -> None:
    kept = Kept(NOW - HOUR, NOW, 50, "boot")
    assert Timekeeper().tell(kept, Reading(NOW + 9, 1, "other")).moment == Moment(NOW - HOUR + 9, NOW + 9)
    set_back = Timekeeper().tell(kept, Reading(NOW - HOUR, 1, "other"))
    assert set_back.moment == Moment(NOW - HOUR, NOW - HOUR) and set_back.carried_from == NOW


def test_a_store_that_nobody_has_written_begins_at_the_date() -> None:
    told = Timekeeper().tell(None, Reading(NOW, 7, "boot"))
    assert told.moment == Moment(NOW, NOW) and told.kept == Kept(NOW, NOW, 7, "boot") and told.is_due


def test_within_a_boot_time_does_not_go_back() -> None:
    kept = Kept(NOW, NOW, 1000, "boot")
    assert Timekeeper().tell(kept, Reading(NOW, 400, "boot")).moment.steady_ms == NOW


def test_the_row_is_due_when_it_has_become_old() -> None:
    keeper = Timekeeper()
    first = keeper.tell(None, Reading(NOW, 0, "boot"))
    keeper.agree(first)
    for elapsed, is_due in ((KEEP_EVERY_MS - 1, False), (KEEP_EVERY_MS, True)):
        assert keeper.tell(first.kept, Reading(NOW + elapsed, elapsed, "boot")).is_due is is_due


def test_a_clock_that_was_always_another_is_no_jump() -> None:
    """Two hosts of one store need not agree on the date: the calendar is the first one's."""
    keeper = Timekeeper()
    keeper.agree(keeper.tell(Kept(NOW, NOW, 0, "boot"), Reading(NOW + HOUR, 0, "boot")))
    told = keeper.tell(Kept(NOW + 10, NOW + 10, 10, "boot"), Reading(NOW + HOUR + 20, 20, "boot"))
    assert told.carried_from is None and told.moment.calendar_ms == NOW + 20


def jumped(by_ms: int) -> Told:
    keeper = Timekeeper()
    first = keeper.tell(None, Reading(NOW, 0, "boot"))
    keeper.agree(first)
    return keeper.tell(first.kept, Reading(NOW + by_ms, 0, "boot"))


def test_what_counted_before_a_jump_counts_in_the_window_that_is_now() -> None:
    fixed = Budget(tokens=5, window=Window("fixed", 3600))
    slots = Slots.of(fixed.window)
    before = slots.at(NOW)
    for by_ms in (3 * HOUR, -3 * HOUR):
        told = jumped(by_ms)
        assert carried(fixed.name, before, told) == slots.at(NOW + by_ms) != before
    assert carried(fixed.name, before - 1, jumped(3 * HOUR)) is None, "it had ceased to count"


def test_what_rolls_and_what_never_ends_knows_nothing_of_the_date() -> None:
    rolling, balance = Budget(tokens=5, window=Window("rolling", 600)), Budget(tokens=5)
    slot = Slots.of(rolling.window).at(NOW)
    assert carried(rolling.name, slot, jumped(3 * HOUR)) == slot
    assert carried(rolling.name, slot + 9, jumped(0)) == slot, "nothing lies ahead"
    assert carried(balance.name, 0, jumped(3 * HOUR)) == 0


@pytest.mark.parametrize("name", ["", "tokens", "tokens/weekly/7", "tokens/fixed/", "tokens/fixed/0", "tokens/fixed/²"])
def test_a_name_that_no_release_wrote_is_left_alone(name: str) -> None:
    assert carried(name, 7, jumped(3 * HOUR)) == 7

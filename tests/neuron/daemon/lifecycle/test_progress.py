from __future__ import annotations

import asyncio

from cortex_core.fleet import LoadProgress
from neuron.daemon.lifecycle.progress import ProgressClock, Watchers, load_deadline_s


def at(num_bytes: int, phase: str = "weights") -> LoadProgress:
    return LoadProgress(phase, num_bytes, 1000)


def test_the_time_left_follows_from_the_rate_of_this_phase() -> None:
    clock = ProgressClock()
    assert clock.feed(at(0), 10.0).eta_s is None
    assert clock.feed(at(10), 10.1).eta_s is None, "too early to tell"
    assert clock.feed(at(250), 12.0).eta_s == 6.0
    assert clock.feed(at(1000), 18.0).eta_s == 0.0


def test_what_was_there_at_the_beginning_is_not_fast() -> None:
    clock = ProgressClock()
    clock.feed(at(800), 0.0)
    assert clock.feed(at(900), 10.0).eta_s == 10.0


def test_every_phase_is_timed_on_its_own() -> None:
    clock = ProgressClock()
    clock.feed(at(0, "fetching"), 0.0)
    clock.feed(at(1000, "fetching"), 100.0)
    assert clock.feed(at(0), 101.0).eta_s is None
    assert clock.feed(at(500), 102.0).eta_s == 1.0
    assert clock.feed(at(100), 103.0).eta_s is None, "it began anew"


async def test_everyone_who_waits_is_woken_and_a_wait_ends_by_itself() -> None:
    watchers = Watchers()
    waiting = [asyncio.create_task(watchers.changed(1000)) for _ in range(3)]
    await asyncio.sleep(0)
    watchers.wake()
    await asyncio.gather(*waiting)
    await watchers.changed(0.0)
    assert watchers._waiting == []


def test_a_deadline_grows_with_the_bytes() -> None:
    assert load_deadline_s(0, floor_s=300, min_bytes_per_s=50) == 300
    assert load_deadline_s(5000, floor_s=300, min_bytes_per_s=50) == 400

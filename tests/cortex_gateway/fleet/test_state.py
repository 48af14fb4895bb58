"""The owner of the snapshot: who hears of a change, and what is forgotten with a configuration."""

from __future__ import annotations

import logging

import pytest
from cortex_core.fleet import ModelInfo, Servable
from cortex_core.gateway_config import BreakerSection, NeuronEntry
from cortex_gateway.fleet.activity import Activity
from cortex_gateway.fleet.state import Fleet
from cortex_gateway.fleet.transitions import OperationStarted, Polled, PollMissed

ALPHA, BETA = NeuronEntry("alpha", "http://a"), NeuronEntry("beta", "http://b")
LOADED = {"m": ModelInfo(id="m", status="loaded")}


class Request:
    """Under way on a node."""

    def __init__(self) -> None:
        self.num_told = 0

    def node_is_lost(self) -> None:
        self.num_told += 1


def fleet() -> Fleet:
    opened = Fleet((ALPHA, BETA), Activity(), BreakerSection(failures=2))
    opened.apply(Polled("alpha", 1.0, LOADED))
    return opened


async def test_whoever_waits_is_woken_by_the_next_change_and_by_no_other() -> None:
    held = fleet()
    changed = held.changed()
    assert held.has_waiters and not changed.done()
    held.apply(OperationStarted("nobody", "m", "load", 2.0))
    assert held.has_waiters, "of a node that is not there nothing changes"
    held.apply(OperationStarted("alpha", "m", "unload", 2.0))
    await changed
    assert not held.has_waiters and held.snapshot.nodes["alpha"].status("m") == "unloading"


async def test_one_that_gives_up_waiting_takes_nobody_along() -> None:
    held = fleet()
    first, second = held.changed(), held.changed()
    first.cancel()
    held.wake()
    await second


def test_what_is_under_way_on_a_node_that_falls_silent_hears_of_it_once() -> None:
    held, here, elsewhere = fleet(), Request(), Request()
    held.under_way = {"alpha": {here}, "beta": {elsewhere}}
    for _ in range(4):
        held.apply(PollMissed("alpha", "timeout", unhealthy_after=2))
    assert (here.num_told, elsewhere.num_told) == (1, 0)


def test_a_process_that_has_ended_says_so_on_its_connections() -> None:
    held, request = fleet(), Request()
    held.under_way = {"alpha": {request}}
    held.apply(PollMissed("alpha", "refused", unhealthy_after=1, is_gone=True))
    assert held.snapshot.nodes["alpha"].health == "unhealthy" and request.num_told == 0


def test_another_address_is_another_node_and_the_rest_stays() -> None:
    held = fleet()
    held.activity.begin("beta", "m", 1.0)
    held.breakers.begun("alpha", "m")
    held.breakers.failed("alpha", "m", 1.0)
    version = held.snapshot.version
    held.reconfigure((ALPHA, BETA), BreakerSection(failures=9))
    assert held.snapshot.version > version, "everyone looks again"
    assert held.snapshot.nodes["alpha"].models and held.breakers.get("alpha", "m").failures == 1
    held.reconfigure((NeuronEntry("alpha", "http://elsewhere"), BETA), BreakerSection(failures=9))
    assert not held.snapshot.nodes["alpha"].models and held.breakers.get("alpha", "m").failures == 0
    assert held.activity.in_flight("beta", "m") == 1


def test_a_model_that_turned_bad_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    held = fleet()
    bad = {"m": ModelInfo(id="m", status="loaded", servable=Servable(ok=False, reason="engine_dead", detail="x"))}
    with caplog.at_level(logging.WARNING, "cortex_gateway.fleet.state"):
        for at in (2.0, 3.0, 4.0):
            held.apply(Polled("alpha", at, bad))
    assert [record.getMessage() for record in caplog.records] == [
        "model m on alpha cannot be served: engine_dead x",
    ]

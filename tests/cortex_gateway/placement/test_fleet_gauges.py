"""What a scrape reads from the fleet."""

from __future__ import annotations

from cortex_core.fleet import HealthResponse, ModelInfo, ModelLoad
from cortex_core.gateway_config import BreakerSection, NeuronEntry
from cortex_gateway.fleet.activity import Activity
from cortex_gateway.fleet.state import Fleet
from cortex_gateway.fleet.transitions import Polled, PollMissed, PollRefused
from cortex_gateway.placement.fleet_gauges import FleetCollector
from cortex_gateway.placement.queue import WaitingQueue

NEURONS = (NeuronEntry("alpha", "http://a"), NeuronEntry("beta", "http://b"))


def samples(fleet: Fleet, waiting: WaitingQueue | None = None) -> dict[tuple[str, ...], float]:
    collector = FleetCollector(fleet, waiting or WaitingQueue(), is_known=lambda model: model == "m")
    return {
        (sample.name, *sample.labels.values()): sample.value
        for metric in collector.collect()
        for sample in metric.samples
    }


def a_fleet() -> Fleet:
    fleet = Fleet(NEURONS, Activity(), BreakerSection(failures=1))
    loads = {"m": ModelLoad(id="m", in_flight=3, queue_depth=2, rejected_queue_full=5)}
    fleet.apply(Polled("alpha", 1.0, {"m": ModelInfo(id="m", status="loaded")}, loads, HealthResponse()))
    return fleet


def test_a_node_that_refuses_is_neither_healthy_nor_gone() -> None:
    fleet = a_fleet()
    fleet.apply(PollRefused("beta", "no secret", "secret_required"))
    found = samples(fleet)
    assert (found["cortex_node_healthy", "alpha"], found["cortex_node_refusing", "alpha"]) == (1, 0)
    assert (found["cortex_node_healthy", "beta"], found["cortex_node_refusing", "beta"]) == (0, 1)
    fleet.apply(PollMissed("alpha", "gone", unhealthy_after=1))
    assert samples(fleet)["cortex_node_healthy", "alpha"] == 0


def test_a_ceiling_of_nothing_is_unknown_and_a_load_of_nothing_is_none() -> None:
    found = samples(a_fleet())
    assert found["cortex_model_in_flight", "alpha", "m"] == 3
    assert found["cortex_model_anon_in_flight", "alpha", "m"] == 0
    assert ("cortex_model_max_in_flight", "alpha", "m") not in found
    assert found["cortex_model_rejections_total", "alpha", "m", "queue_full"] == 5


def test_breakers_show_their_state_and_how_often_they_opened() -> None:
    fleet = a_fleet()
    assert samples(fleet)["cortex_breaker_state", "alpha", "m"] == 0
    fleet.breakers.begun("alpha", "m")
    fleet.breakers.failed("alpha", "m", 1.0)
    found = samples(fleet)
    assert found["cortex_breaker_state", "alpha", "m"] == 2
    assert found["cortex_breaker_openings_total", "alpha", "m"] == 1


def test_models_that_nobody_knows_wait_under_one_name() -> None:
    waiting = WaitingQueue()
    for model in ("m", "m", "invented", "invented too"):
        waiting.join(model, 1.0)
    found = samples(a_fleet(), waiting)
    shown = {labels: value for labels, value in found.items() if labels[0] == "cortex_waiting_requests"}
    assert shown == {("cortex_waiting_requests", "m"): 2, ("cortex_waiting_requests", "unknown"): 2}


def test_requests_on_a_node_that_left_the_configuration_are_still_seen() -> None:
    fleet = a_fleet()
    fleet.activity.begin("alpha", "m", 1.0)
    assert samples(fleet)["cortex_in_flight", "alpha", "m"] == 1
    fleet.reconfigure(NEURONS[1:], BreakerSection())
    found = samples(fleet)
    assert found["cortex_leaving_requests", "alpha"] == 1 and ("cortex_node_healthy", "alpha") not in found

"""Gauges that are read from the fleet at each scrape: nodes, devices, models, breakers and the queue."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from cortex_gateway.fleet.breaker import BreakerState
from cortex_gateway.fleet.snapshot import FleetSnapshot
from cortex_gateway.fleet.state import Fleet
from cortex_gateway.placement.queue import WaitingQueue

_RESIDENT = ("node", "model")


class FleetCollector(Collector):
    """The polled gauges. A ceiling of 0 is unknown and not exposed. is_known: of a model's id."""

    def __init__(self, fleet: Fleet, waiting: WaitingQueue, is_known: Callable[[str], bool]) -> None:
        self._fleet = fleet
        self._waiting = waiting
        self._is_known = is_known

    def collect(self) -> Iterable[Metric]:
        snapshot = self._fleet.snapshot
        yield from _model_gauges(snapshot)
        yield from _device_gauges(snapshot)
        healthy = GaugeMetricFamily("cortex_node_healthy", "1 if requests are routed to the node.", labels=["node"])
        refusing = GaugeMetricFamily(
            "cortex_node_refusing", "1 if the node is there and answers nothing this gateway asks.", labels=["node"]
        )
        in_flight = GaugeMetricFamily(
            "cortex_in_flight", "Requests this gateway has running on a model.", labels=list(_RESIDENT)
        )
        leaving = GaugeMetricFamily(
            "cortex_leaving_requests",
            "Requests that go on on nodes that are not in the configuration any more.",
            labels=["node"],
        )
        for node in snapshot.nodes.values():
            healthy.add_metric([node.name], 1.0 if node.is_routable else 0.0)
            refusing.add_metric([node.name], 1.0 if node.health == "refusing" else 0.0)
            for model in node.models:
                in_flight.add_metric([node.name, model], self._fleet.activity.in_flight(node.name, model))
        for name, count in self._fleet.activity.leaving(snapshot.nodes).items():
            leaving.add_metric([name], count)
        yield healthy
        yield refusing
        yield in_flight
        yield leaving
        breaker_state = GaugeMetricFamily(
            "cortex_breaker_state", "Circuit breaker: 0 closed, 1 half-open, 2 open.", labels=list(_RESIDENT)
        )
        for node in snapshot.nodes.values():
            for model in node.models:
                state = self._fleet.breakers.get(node.name, model).state
                breaker_state.add_metric([node.name, model], _BREAKER_VALUES[state])
        yield breaker_state
        openings = CounterMetricFamily(
            "cortex_breaker_openings", "Times a circuit breaker opened.", labels=list(_RESIDENT)
        )
        for (node_name, model), count in self._fleet.breakers.num_opened.items():
            openings.add_metric([node_name, model], count)
        yield openings
        waiting = GaugeMetricFamily("cortex_waiting_requests", "Requests that no node serves yet.", labels=["model"])
        # While a node has not been asked yet, requests wait for it whatever they ask for: no label of a client's words.
        num_waiting: dict[str, int] = {}
        for queue in self._waiting.in_order():
            model = queue.model if self._is_known(queue.model) else "unknown"
            num_waiting[model] = num_waiting.get(model, 0) + queue.num_requests
        for model, count in num_waiting.items():
            waiting.add_metric([model], count)
        yield waiting


_BREAKER_VALUES: dict[BreakerState, float] = {"closed": 0.0, "half_open": 1.0, "open": 2.0}

_LOAD_GAUGES = (
    ("in_flight", "Requests the neuron is running.", False),
    ("queue_depth", "Requests waiting on the neuron.", False),
    ("max_in_flight", "Ceiling of running requests.", True),
    ("max_queue_depth", "Ceiling of waiting requests.", True),
    ("tok_s_prefill", "Prefill speed, tokens per second.", False),
    ("tok_s_decode", "Decode speed, tokens per second.", False),
    ("anon_in_flight", "Running requests without an identity.", False),
    ("anon_max_in_flight", "Ceiling of running requests without an identity.", True),
)
_REJECTIONS = (
    ("queue_full", "rejected_queue_full"),
    ("wait_timeout", "rejected_timeout"),
    ("per_principal", "rejected_per_principal"),
    ("anon_yield", "rejected_anon_yield"),
    ("kv_timeout", "rejected_kv_timeout"),
    ("kv_unservable", "rejected_kv_unservable"),
)
_DEVICE_GAUGES = (
    ("vram_used_mb", "Device memory in use, MB."),
    ("vram_free_mb", "Device memory free, MB."),
    ("utilization_pct", "Device utilisation, percent."),
    ("temp_c", "Device temperature, degrees Celsius."),
)


def _model_gauges(snapshot: FleetSnapshot) -> Iterator[Metric]:
    for field, text, is_ceiling in _LOAD_GAUGES:
        gauge = GaugeMetricFamily(f"cortex_model_{field}", text, labels=list(_RESIDENT))
        for node in snapshot.nodes.values():
            for model, load in node.loads.items():
                value = getattr(load, field)
                if value or not is_ceiling:
                    gauge.add_metric([node.name, model], value)
        yield gauge
    rejections = CounterMetricFamily(
        "cortex_model_rejections",
        "Requests a neuron refused since the model was loaded.",
        labels=[*_RESIDENT, "reason"],
    )
    for node in snapshot.nodes.values():
        for model, load in node.loads.items():
            for reason, field in _REJECTIONS:
                rejections.add_metric([node.name, model, reason], getattr(load, field))
    yield rejections


def _device_gauges(snapshot: FleetSnapshot) -> Iterator[Metric]:
    for field, text in _DEVICE_GAUGES:
        gauge = GaugeMetricFamily(f"cortex_device_{field}", text, labels=["node", "device"])
        for node in snapshot.nodes.values():
            for device in node.devices:
                gauge.add_metric([node.name, str(device.index)], getattr(device, field))
        yield gauge

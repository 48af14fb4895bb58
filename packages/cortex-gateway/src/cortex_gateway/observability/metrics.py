"""Prometheus metrics of one gateway, in a registry of its own. Each one that is described here is emitted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from cortex_core.serving.connection_table import ConnectionTable
from cortex_core.serving.metrics import ConnectionCollector
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from cortex_gateway.body_workers.pool import ENDED
from cortex_gateway.body_workers.process import Lost
from cortex_gateway.fleet.breaker import BreakerState
from cortex_gateway.fleet.snapshot import FleetSnapshot
from cortex_gateway.fleet.state import Fleet
from cortex_gateway.identity.estimate import Usage
from cortex_gateway.identity.principal import Principal
from cortex_gateway.placement.waiting import Waiting

LONG_BUCKETS = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200)
SHORT_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 30, 60, 120)
TOKENS_PER_SECOND_BUCKETS = (1, 2.5, 5, 10, 15, 20, 30, 40, 60, 80, 120, 200)

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
MIN_RATE_WINDOW_S = 0.1

_PLACE = ("model", "node")
_RESIDENT = ("node", "model")
_KEY = ("account", "key")


class ModelSeries:
    """The children of one (model, node), looked up once."""

    __slots__ = (
        "cached_tokens",
        "client_gone",
        "cold_starts",
        "completion_tokens",
        "duration",
        "errors",
        "prompt_tokens",
        "requests",
        "tokens_per_second",
        "ttft",
    )

    def __init__(self, metrics: Metrics, model: str, node: str) -> None:
        self.requests = metrics.requests.labels(model, node)
        self.duration = metrics.request_duration.labels(model, node)
        self.errors = metrics.request_errors.labels(model, node)
        self.client_gone = metrics.client_gone.labels(model, node)
        self.cold_starts = metrics.cold_starts.labels(model, node)
        self.ttft = metrics.ttft.labels(model, node)
        self.tokens_per_second = metrics.tokens_per_second.labels(model, node)
        self.prompt_tokens = metrics.prompt_tokens.labels(model, node)
        self.completion_tokens = metrics.completion_tokens.labels(model, node)
        self.cached_tokens = metrics.cached_tokens.labels(model, node)


class Metrics:
    """Counters and histograms that events move, and gauges read from the fleet snapshot at each scrape.

    Labels hold only models and nodes that a request was routed to, and ids of keys that exist, so their number is
    bounded by the fleet and by whoever makes keys. No label holds a secret.
    """

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("cortex_requests", "Requests sent to a neuron.", _PLACE, registry=registry)
        self.request_duration = Histogram(
            "cortex_request_duration_seconds",
            "Until the neuron's response headers.",
            _PLACE,
            buckets=LONG_BUCKETS,
            registry=registry,
        )
        self.request_errors = Counter(
            "cortex_request_errors",
            "Requests that a neuron did not answer: connection, timeout, malformed answer.",
            _PLACE,
            registry=registry,
        )
        self.finished = Counter(
            "cortex_finished_requests",
            "Inference requests of clients, by how they ended: each of them once, however often it was sent.",
            ("surface", "outcome"),
            registry=registry,
        )
        self.retries = Counter(
            "cortex_retries",
            "Requests that were decided anew, as the node was gone or had no such model any more before it answered.",
            _PLACE,
            registry=registry,
        )
        self.resumes = Counter(
            "cortex_resumes",
            "Streams that were cut off on this node in their middle, and went on from there.",
            _PLACE,
            registry=registry,
        )
        self.blamed = Counter(
            "cortex_blamed_requests",
            "Requests that end processes: found out (`died`), come again (`again`), found out by a neuron (`engine`).",
            ("model", "stage"),
            registry=registry,
        )
        self.client_gone = Counter(
            "cortex_client_gone", "Requests whose client hung up before the end.", _PLACE, registry=registry
        )
        self.rejections = Counter(
            "cortex_rejected_requests",
            "Requests the gateway answered with an error of its own, by error code.",
            ("code",),
            registry=registry,
        )
        self.cold_starts = Counter(
            "cortex_cold_starts", "Requests that waited for a load of their model.", _PLACE, registry=registry
        )
        self.evictions = Counter(
            "cortex_evictions", "Models this gateway unloaded, by reason.", (*_PLACE, "reason"), registry=registry
        )
        self.loads = Counter(
            "cortex_model_loads",
            "Load calls, by outcome and by what asked for them.",
            (*_PLACE, "outcome", "reason"),
            registry=registry,
        )
        self.queue_wait = Histogram(
            "cortex_queue_wait_seconds",
            "How long requests waited for a node that serves their model, those that had to wait.",
            ("model",),
            buckets=LONG_BUCKETS,
            registry=registry,
        )
        self.affinity = Counter(
            "cortex_affinity_hits",
            "Requests sent, among several replicas, to one that knows their session or the beginning of their prompt.",
            (*_PLACE, "kind"),
            registry=registry,
        )
        self.load_duration = Histogram(
            "cortex_model_load_seconds", "Successful loads.", _PLACE, buckets=LONG_BUCKETS, registry=registry
        )
        self.ttft = Histogram(
            "cortex_time_to_first_token_seconds",
            "From the request to the first byte of the answer's body that is no keep-alive.",
            _PLACE,
            buckets=SHORT_BUCKETS,
            registry=registry,
        )
        self.tokens_per_second = Histogram(
            "cortex_tokens_per_second",
            "Completion tokens over the time between the first and the last byte.",
            _PLACE,
            buckets=TOKENS_PER_SECOND_BUCKETS,
            registry=registry,
        )
        self.prompt_tokens = Counter("cortex_prompt_tokens", "Prompt tokens.", _PLACE, registry=registry)
        self.completion_tokens = Counter("cortex_completion_tokens", "Completion tokens.", _PLACE, registry=registry)
        self.cached_tokens = Counter(
            "cortex_cached_prompt_tokens", "Prompt tokens taken from a prefix cache.", _PLACE, registry=registry
        )
        self.spend_prompt_tokens = Counter(
            "cortex_spend_prompt_tokens", "Prompt tokens charged to a key.", _KEY, registry=registry
        )
        self.spend_completion_tokens = Counter(
            "cortex_spend_completion_tokens", "Completion tokens charged to a key.", _KEY, registry=registry
        )
        self.spend_tokens = Counter("cortex_spend_tokens", "All tokens charged to a key.", _KEY, registry=registry)
        self.key_refusals = Counter(
            "cortex_key_refusals",
            "Requests refused because of what their key may, by which limit.",
            (*_KEY, "reason"),
            registry=registry,
        )
        self.access_refusals = Counter(
            "cortex_access_refused",
            "Requests refused before anything was looked at but where they come from: by the name asked for, by page.",
            ("reason",),
            registry=registry,
        )
        for reason in ("host", "origin"):
            self.access_refusals.labels(reason)
        self.body_workers_ended = Counter(
            "cortex_body_workers_ended",
            "Processes that read large bodies and ended with the one they were at, by reason.",
            ("reason",),
            registry=registry,
        )
        for ended in ENDED:
            self.body_workers_ended.labels(ended)
        self.reloads = Counter(
            "cortex_config_reloads",
            "Times the configuration was read again, by what asked for it and what came of it.",
            ("trigger", "outcome"),
            registry=registry,
        )
        for trigger in ("signal", "file", "admin"):
            for outcome in ("applied", "unchanged", "refused"):
                self.reloads.labels(trigger, outcome)
        self.config_valid = Gauge(
            "cortex_config_valid", "0 if the files were refused when they were last read.", registry=registry
        )
        self.config_valid.set(1)
        self._series: dict[tuple[str, str], ModelSeries] = {}

    def observe_fleet(self, fleet: Fleet, waiting: Waiting, is_known: Callable[[str], bool]) -> None:
        """Expose the gauges of a fleet's snapshot, its breakers and the queue as well. is_known: of a model's id."""
        self.registry.register(FleetCollector(fleet, waiting, is_known))

    def observe_connections(self, tables: Mapping[str, ConnectionTable]) -> None:
        """Expose how many connections each listener has, by the listeners' names."""
        self.registry.register(ConnectionCollector("cortex", tables))

    def body_worker_ended(self, reason: Lost) -> None:
        self.body_workers_ended.labels(reason).inc()

    def render(self) -> bytes:
        return generate_latest(self.registry)

    def place(self, model: str, node: str) -> ModelSeries:
        series = self._series.get((model, node))
        if series is None:
            series = self._series[(model, node)] = ModelSeries(self, model, node)
        return series

    def charged(self, principal: Principal, usage: Usage) -> None:
        labels = (principal.account_id, principal.key_id)
        if usage.total:
            self.spend_prompt_tokens.labels(*labels).inc(usage.prompt)
            self.spend_completion_tokens.labels(*labels).inc(usage.completion)
            self.spend_tokens.labels(*labels).inc(usage.total)

    def key_refused(self, principal: Principal, reason: str) -> None:
        self.key_refusals.labels(principal.account_id, principal.key_id, reason).inc()

    def access_refused(self, reason: str) -> None:
        self.access_refusals.labels(reason).inc()

    def config_reloaded(self, trigger: str, outcome: str) -> None:
        self.reloads.labels(trigger, outcome).inc()
        self.config_valid.set(outcome != "refused")

    def load_finished(self, model: str, node: str, outcome: str, reason: str, seconds: float) -> None:
        self.loads.labels(model, node, outcome, reason).inc()
        if outcome == "loaded":
            self.load_duration.labels(model, node).observe(seconds)

    def evicted(self, model: str, node: str, reason: str) -> None:
        self.evictions.labels(model, node, reason).inc()


class FleetCollector(Collector):
    """The polled gauges. A ceiling of 0 is unknown and not exposed."""

    def __init__(self, fleet: Fleet, waiting: Waiting, is_known: Callable[[str], bool]) -> None:
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

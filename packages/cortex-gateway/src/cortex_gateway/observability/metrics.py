"""Prometheus metrics of one gateway, in a registry of its own. Each one that is described here is emitted."""

from __future__ import annotations

from collections.abc import Mapping

from cortex_core.serving.connection_table import ConnectionTable
from cortex_core.serving.metrics import ConnectionCollector
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.registry import Collector

LONG_BUCKETS = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200)
SHORT_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 30, 60, 120)
TOKENS_PER_SECOND_BUCKETS = (1, 2.5, 5, 10, 15, 20, 30, 40, 60, 80, 120, 200)

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
MIN_RATE_WINDOW_S = 0.1

BODY_WORKER_ENDS = ("cpu", "wall", "memory", "died")
"""Why a process that reads large bodies may end with the one it is at."""

_PLACE = ("model", "node")
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


class Places(dict[tuple[str, str], ModelSeries]):
    """The series of each (model, node), made when they are first asked for."""

    def __init__(self, metrics: Metrics) -> None:
        super().__init__()
        self._metrics = metrics

    def __missing__(self, place: tuple[str, str]) -> ModelSeries:
        series = self[place] = ModelSeries(self._metrics, *place)
        return series


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
        self.mixed = Counter(
            "cortex_mixed_streams",
            "Streams that went on at this node, which serves the model otherwise than the one that began them.",
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
        for ended in BODY_WORKER_ENDS:
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
        self.places = Places(self)

    def observe(self, collector: Collector) -> None:
        """Expose what a collector reads at each scrape as well."""
        self.registry.register(collector)

    def observe_connections(self, tables: Mapping[str, ConnectionTable]) -> None:
        """Expose how many connections each listener has, by the listeners' names."""
        self.registry.register(ConnectionCollector("cortex", tables))

    def body_worker_ended(self, reason: str) -> None:
        self.body_workers_ended.labels(reason).inc()

    def render(self) -> bytes:
        return generate_latest(self.registry)

    def charged(self, account: str, key: str, *, prompt_tokens: int, completion_tokens: int) -> None:
        if prompt_tokens or completion_tokens:
            self.spend_prompt_tokens.labels(account, key).inc(prompt_tokens)
            self.spend_completion_tokens.labels(account, key).inc(completion_tokens)
            self.spend_tokens.labels(account, key).inc(prompt_tokens + completion_tokens)

    def key_refused(self, account: str, key: str, reason: str) -> None:
        self.key_refusals.labels(account, key, reason).inc()

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

"""Prometheus metrics of this neuron, in a registry of its own.

What happens is counted where it happens; what merely is (queues, pages, devices) is read from the caches when scraped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from cortex_core.fleet import BuildInfo
from cortex_core.http_access import REASONS
from cortex_core.serving.connection_table import ConnectionTable
from cortex_core.serving.metrics import ConnectionCollector
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from neuron.daemon.hardware.monitor import HardwareReading
from neuron.daemon.lifecycle.served_model import ServedModel
from neuron.daemon.memory.weight_cache import GIVE_UP_REASONS, WeightCache

CONTENT_TYPE = CONTENT_TYPE_LATEST

LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
LONG_BUCKETS = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200)
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)

_STATUSES = ("fetching", "loading", "loaded", "recovering", "failed", "unloading")


class Metrics:
    """Counters and histograms by model; the label is an id that is or was served here, never a client's words."""

    def __init__(
        self,
        *,
        build: BuildInfo,
        models: Callable[[], Sequence[ServedModel]],
        reading: Callable[[], HardwareReading],
        weights: WeightCache,
        connections: ConnectionTable,
    ) -> None:
        registry = self._registry = CollectorRegistry(auto_describe=True)
        self.requests = Counter(
            "neuron_requests",
            "Inference requests by how they ended: ok, client_gone, or the code of an error.",
            ("model", "route", "outcome"),
            registry=registry,
        )
        self.duration = Histogram(
            "neuron_request_duration_seconds",
            "From the request's arrival to the end of its answer.",
            ("model", "route"),
            buckets=LONG_BUCKETS,
            registry=registry,
        )
        self.queue_wait = Histogram(
            "neuron_queue_wait_seconds",
            "From the request's arrival to its seat.",
            ("model",),
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )
        self.time_to_first_token = Histogram(
            "neuron_time_to_first_token_seconds",
            "From the request's arrival to its first token.",
            ("model",),
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )
        self.inter_token = Histogram(
            "neuron_inter_token_latency_seconds",
            "Between the tokens of one choice, after its first.",
            ("model",),
            buckets=TOKEN_BUCKETS,
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "neuron_prompt_tokens", "Prompt tokens of requests that were answered.", ("model",), registry=registry
        )
        self.completion_tokens = Counter(
            "neuron_completion_tokens", "Tokens generated for clients.", ("model",), registry=registry
        )
        self.cached_tokens = Counter(
            "neuron_cached_prompt_tokens", "Prompt tokens served from the prefix cache.", ("model",), registry=registry
        )
        self.load_seconds = Histogram(
            "neuron_model_load_seconds",
            "From the load request to a model that serves, fetch included.",
            ("model",),
            buckets=LONG_BUCKETS,
            registry=registry,
        )
        self.text_workers_ended = Counter(
            "neuron_text_workers_ended",
            "Text workers that ended with the request they were at, by why.",
            ("model", "reason"),
            registry=registry,
        )
        self.access_refused = Counter(
            "neuron_access_refused",
            "Requests refused before anything was looked at but where they come from.",
            ("reason",),
            registry=registry,
        )
        self.access_unproven = Counter(
            "neuron_access_unproven",
            "Requests that were served and will be refused once the secret of the fleet is required.",
            ("reason",),
            registry=registry,
        )
        for reason in REASONS:
            self.access_refused.labels(reason)
            if reason.startswith("secret"):
                self.access_unproven.labels(reason)
        registry.register(_Snapshot(build, models, reading, weights))
        registry.register(ConnectionCollector("neuron", {"api": connections}))

    def render(self) -> bytes:
        """The text exposition."""
        return generate_latest(self._registry)


class _Snapshot(Collector):
    """Gauges and cumulative counters that live elsewhere, read when scraped."""

    def __init__(
        self,
        build: BuildInfo,
        models: Callable[[], Sequence[ServedModel]],
        reading: Callable[[], HardwareReading],
        weights: WeightCache,
    ) -> None:
        self._weights = weights
        self._build = build
        self._models = models
        self._reading = reading

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        build = InfoMetricFamily("neuron_build", "What runs here.")
        versions = {"version": self._build.package_version, "git_sha": self._build.git_sha}
        build.add_metric((), {**versions, "torch": self._build.torch_version or "unknown"})
        yield build
        models = self._models()
        yield from self._states(models)
        yield from self._admission(models)
        yield from self._texts(models)
        yield from self._engines(models)
        yield from self._devices()
        yield from self._copies()

    @staticmethod
    def _states(models: Sequence[ServedModel]) -> Iterator[Metric]:
        state = GaugeMetricFamily("neuron_model_state", "1 for the state a model is in.", labels=("model", "state"))
        restarts = CounterMetricFamily("neuron_engine_restarts", "Rebuilds of an engine group.", labels=("model",))
        for model in models:
            for status in _STATUSES:
                state.add_metric((model.id, status), float(model.state.phase == status))
            if model.group is not None:
                restarts.add_metric((model.id,), model.group.num_restarts)
        yield state
        yield restarts

    @staticmethod
    def _admission(models: Sequence[ServedModel]) -> Iterator[Metric]:
        label = ("model",)
        gauges = {
            "in_flight": GaugeMetricFamily("neuron_requests_in_flight", "Requests being worked on.", labels=label),
            "queue_depth": GaugeMetricFamily("neuron_queue_depth", "Requests waiting for a seat.", labels=label),
            "max_in_flight": GaugeMetricFamily("neuron_max_in_flight", "Seats.", labels=label),
            "anon_in_flight": GaugeMetricFamily(
                "neuron_anon_in_flight", "Requests without identity being worked on.", labels=label
            ),
            "anon_max_in_flight": GaugeMetricFamily(
                "neuron_anon_max_in_flight", "Seats that requests without identity may have.", labels=label
            ),
            "num_principals": GaugeMetricFamily(
                "neuron_principals", "Accounts and keys with requests here; those without are one.", labels=label
            ),
            "reserved_pages": GaugeMetricFamily(
                "neuron_kv_reserved_pages", "KV pages promised to requests in flight.", labels=label
            ),
        }
        rejected = CounterMetricFamily(
            "neuron_rejections", "Requests sent away by admission.", labels=("model", "reason")
        )
        for model in models:
            admission = model.admission
            for field, family in gauges.items():
                family.add_metric((model.id,), getattr(admission, field))
            for reason, count in admission.rejected.items():
                rejected.add_metric((model.id, reason), count)
        yield from gauges.values()
        yield rejected

    @staticmethod
    def _texts(models: Sequence[ServedModel]) -> Iterator[Metric]:
        workers = GaugeMetricFamily(
            "neuron_text_workers", "Processes that prepare requests of a model.", labels=("model",)
        )
        waiting = GaugeMetricFamily("neuron_text_waiting", "Requests waiting for one of them.", labels=("model",))
        for model in models:
            if model.text is not None:
                workers.add_metric((model.id,), model.text.pool.num_workers)
                waiting.add_metric((model.id,), model.text.pool.num_waiting)
        yield from (workers, waiting)

    @staticmethod
    def _engines(models: Sequence[ServedModel]) -> Iterator[Metric]:
        label = ("model",)
        gauges = {
            "running": GaugeMetricFamily("neuron_engine_running", "Sequences that hold pages.", labels=label),
            "waiting": GaugeMetricFamily("neuron_engine_waiting", "Sequences that wait for pages.", labels=label),
            "free_pages": GaugeMetricFamily("neuron_kv_free_pages", "KV pages no sequence holds.", labels=label),
            "total_pages": GaugeMetricFamily("neuron_kv_pages", "KV pages there are.", labels=label),
            "cached_pages": GaugeMetricFamily(
                "neuron_kv_cached_pages", "Free KV pages that hold a reusable prefix.", labels=label
            ),
        }
        counters = {
            "step": CounterMetricFamily("neuron_engine_steps", "Forward passes.", labels=label),
            "graph_steps": CounterMetricFamily(
                "neuron_graph_steps", "Decode steps that were replayed as CUDA graphs.", labels=label
            ),
            "graphless_steps": CounterMetricFamily(
                "neuron_graphless_steps", "Decode steps for which no CUDA graph was recorded.", labels=label
            ),
            "late_compiles": CounterMetricFamily(
                "neuron_late_compiles", "Kernels compiled after warming up, each one a defect.", labels=label
            ),
            "preemptions": CounterMetricFamily("neuron_engine_preemptions", "Sequences set back.", labels=label),
            "prefill_tokens": CounterMetricFamily("neuron_prefill_tokens", "Prompt tokens computed.", labels=label),
            "prefill_seconds": CounterMetricFamily("neuron_prefill_seconds", "Time in prefill.", labels=label),
            "decode_tokens": CounterMetricFamily("neuron_decode_tokens", "Output tokens computed.", labels=label),
            "decode_seconds": CounterMetricFamily("neuron_decode_seconds", "Time in decode.", labels=label),
            "prefix_hit_tokens": CounterMetricFamily(
                "neuron_prefix_cache_hit_tokens", "Prompt tokens found in the prefix cache.", labels=label
            ),
            "prefix_query_tokens": CounterMetricFamily(
                "neuron_prefix_cache_query_tokens", "Prompt tokens looked up in the prefix cache.", labels=label
            ),
        }
        read_bytes = GaugeMetricFamily(
            "neuron_weights_read_bytes", "Bytes of the checkpoint that the last load or rebuild read.", labels=label
        )
        read_rate = GaugeMetricFamily(
            "neuron_weights_read_bytes_per_second", "How fast they were read and put in place.", labels=label
        )
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {**gauges, **counters}
        for model in models:
            if model.loaded is not None:
                for field, family in families.items():
                    family.add_metric((model.id,), getattr(model.stats, field))
                num_bytes, seconds = model.loaded.read_bytes, model.loaded.read_seconds
                read_bytes.add_metric((model.id,), num_bytes)
                read_rate.add_metric((model.id,), num_bytes / seconds if seconds > 0 else 0.0)
        yield from (read_bytes, read_rate)
        yield from gauges.values()
        yield from counters.values()

    def _copies(self) -> Iterator[Metric]:
        cache = self._weights
        yield GaugeMetricFamily(
            "neuron_weight_cache_bytes", "Host memory that holds copies of checkpoints.", value=cache.held_bytes
        )
        yield GaugeMetricFamily(
            "neuron_weight_cache_budget_bytes", "The most that they may take.", value=cache.budget_bytes
        )
        yield GaugeMetricFamily("neuron_weight_cache_models", "How many there are.", value=len(cache.held))
        yield CounterMetricFamily("neuron_weight_cache_hits", "Loads and rebuilds from a copy.", value=cache.hits)
        yield CounterMetricFamily(
            "neuron_weight_cache_misses", "Loads and rebuilds that had no copy.", value=cache.misses
        )
        given_up = CounterMetricFamily("neuron_weight_cache_given_up", "Copies given up.", labels=("reason",))
        for reason in GIVE_UP_REASONS:
            given_up.add_metric((reason,), cache.given_up[reason])
        yield given_up

    def _devices(self) -> Iterator[Metric]:
        reading, label = self._reading(), ("device",)
        used = GaugeMetricFamily("neuron_device_vram_used_mb", "Device memory in use, in MiB.", labels=label)
        free = GaugeMetricFamily("neuron_device_vram_free_mb", "Device memory free, in MiB.", labels=label)
        busy = GaugeMetricFamily("neuron_device_utilization_pct", "Device utilisation in percent.", labels=label)
        heat = GaugeMetricFamily("neuron_device_temp_c", "Device temperature in degrees Celsius.", labels=label)
        for device in reading.devices:
            labels = (str(device.index),)
            used.add_metric(labels, device.vram_used_mb)
            free.add_metric(labels, device.vram_free_mb)
            busy.add_metric(labels, device.utilization_pct)
            heat.add_metric(labels, device.temp_c)
        yield from (used, free, busy, heat)
        yield GaugeMetricFamily(
            "neuron_memory_free_mb", "Memory available on the host, in MiB.", value=reading.memory_free_mb
        )

"""Wire types of the fleet: a neuron's description of itself, and the order to load a model.

Wire types of `/discovery`, `/health`, `/models`, `/models/load` and `/version`. Every field a peer of another age
may lack has a default, and unknown fields are ignored, so gateways and neurons of different versions work
together (absent evidence is never read as failure).
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class DeviceInfo(msgspec.Struct, frozen=True):
    """One accelerator, as found at start."""

    index: int
    name: str
    vram_total_mb: int
    compute_capability: str = ""


class DiscoveryResponse(msgspec.Struct, frozen=True):
    """`GET /discovery`: static facts of a host. `max_prompt_tokens` 0 is unknown.

    A host without accelerators has an empty device list and serves on its CPU: `cpu_count` and
    `memory_total_mb` (0 = unknown) then stand in for device facts.
    """

    hostname: str = "unknown"
    os: str = "unknown"
    kernel: str = "unknown"
    cuda_version: str | None = None
    driver_version: str | None = None
    devices: tuple[DeviceInfo, ...] = ()
    harnesses: tuple[str, ...] = ()
    cuda_unavailable_reason: str | None = None
    max_prompt_tokens: int = 0
    cpu_count: int = 0
    memory_total_mb: int = 0


class DeviceHealth(msgspec.Struct, frozen=True):
    """One device at the moment: MiB, per cent, degrees Celsius."""

    index: int
    vram_used_mb: int = 0
    vram_free_mb: int = 0
    utilization_pct: int = 0
    temp_c: int = 0


class ActivationFailure(msgspec.Struct, frozen=True):
    """retry_at: when it is tried again (Unix seconds), None where it is not."""

    model_id: str
    error: str
    retry_at: int | None = None


class Activation(msgspec.Struct, frozen=True):
    """Progress of the neuron's `default_models` after start."""

    state: Literal["pre_warming", "ready"] = "ready"
    pending: tuple[str, ...] = ()
    in_progress: str | None = None
    completed: tuple[str, ...] = ()
    failed: tuple[ActivationFailure, ...] = ()


class ModelLoad(msgspec.Struct, frozen=True):
    """How busy one model is. A ceiling of 0 means unknown; rejection counters are cumulative since load.

    idle_s: seconds since the last request left, whoever sent it; None while one is here, or where a peer does not say.
    status: as on /models, but `stalled` where a loaded engine holds work and completes no step, or does not answer:
    it is about to be killed. error: why it is in that state.
    """

    id: str
    in_flight: int = 0
    queue_depth: int = 0
    max_in_flight: int = 0
    max_queue_depth: int = 0
    rejected_queue_full: int = 0
    rejected_timeout: int = 0
    rejected_per_principal: int = 0
    anon_in_flight: int = 0
    anon_max_in_flight: int = 0
    rejected_anon_yield: int = 0
    rejected_kv_timeout: int = 0
    rejected_kv_unservable: int = 0
    kv_budget_mb: int = 0
    kv_available_mb: int = 0
    tok_s_prefill: float = 0.0
    tok_s_decode: float = 0.0
    idle_s: float | None = None
    status: str = ""
    error: str | None = None


class HealthResponse(msgspec.Struct, frozen=True):
    """`GET /health` of a neuron, answered from caches. instance: another for each process; older peers have none."""

    uptime_secs: int = 0
    devices: tuple[DeviceHealth, ...] = ()
    activation: Activation = Activation()
    models: tuple[ModelLoad, ...] = ()
    draining: bool = False
    memory_free_mb: int = 0
    instance: str = ""


Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class ModelSpec(msgspec.Struct, frozen=True):
    """`POST /models/load`: which model, and how. `harness` is kept for older peers, which demand it.

    tensor_parallel: devices that share the model. tensor_split: relative sizes of their parts, in their order, or
    `auto` for the ratio of their free memory; None is equal parts.
    max_model_len caps the context, kv_cache_mb the KV cache; None lets the neuron decide. deterministic: answers do not
    depend on what else the model works on, at the price of speed; dtype: what the weights are loaded as (`auto`,
    `float32`, `bfloat16`, `float16`); None is the neuron's configuration. debug: levers that make the engine fail, for
    tests; refused by a neuron that was not started with `--debug-levers`.
    """

    model_id: str
    harness: str = "candle"
    quant: str | None = None
    tensor_parallel: int | None = None
    devices: tuple[int, ...] | None = None
    max_model_len: int | None = None
    kv_cache_mb: int | None = None
    tensor_split: tuple[float, ...] | Literal["auto"] | None = None
    debug: dict[str, Any] | None = None
    deterministic: bool | None = None
    dtype: Dtype | None = None


OLDEST_LOAD_FIELDS = frozenset(
    (
        "model_id",
        "harness",
        "quant",
        "tensor_parallel",
        "devices",
        "max_model_len",
        "kv_cache_mb",
        "tensor_split",
        "debug",
        "deterministic",
    )
)
"""What a neuron reads of a `ModelSpec` that names no feature of its own. A new field is none of these."""

LOAD_FEATURES = frozenset(f"load.{name}" for name in ModelSpec.__struct_fields__ if name not in OLDEST_LOAD_FIELDS)
"""What this build names in `BuildInfo.features`. A peer ignores fields that it does not know: an order with a newer one
would load something else than was asked for."""


def needed_features(spec: ModelSpec) -> frozenset[str]:
    """What a neuron must name in its `/version` before it is sent the order."""
    defaults = dict(zip(ModelSpec.__struct_fields__[1:], ModelSpec.__struct_defaults__, strict=True))
    return frozenset(
        f"load.{name}"
        for name, default in defaults.items()
        if name not in OLDEST_LOAD_FIELDS and getattr(spec, name) != default
    )


class UnloadRequest(msgspec.Struct, frozen=True):
    """`POST /models/unload`."""

    model_id: str


class PinRequest(msgspec.Struct, frozen=True):
    """`POST /models/pin`: whether a model that is here may be displaced. The pin ends when the model is unloaded."""

    model_id: str
    pinned: bool = True


class LoadProgress(msgspec.Struct, frozen=True):
    """`phase` is `fetching`, `starting`, `weights`, `kv_cache` or `warm_up`; totals are 0 while unknown.

    eta_s: seconds until this phase is done, at the rate so far; None while unknown.
    """

    phase: str
    bytes_done: int = 0
    bytes_total: int = 0
    eta_s: float | None = None


class ContextLimit(msgspec.Struct, frozen=True, omit_defaults=True):
    """Tokens: the whole window, and what prompt and answer may use of it."""

    context: int
    input: int | None = None
    output: int | None = None


class ModelCost(msgspec.Struct, frozen=True, omit_defaults=True):
    """USD per million tokens. An absent block is "not priced", which is not the same as 0 ("free")."""

    input: float = 0.0
    output: float = 0.0
    cache_read: float | None = None
    cache_write: float | None = None


class Servable(msgspec.Struct, frozen=True, omit_defaults=True):
    """Whether requests for the model would be served now; if not, why, as a code and in words."""

    ok: bool
    reason: str | None = None
    detail: str | None = None


ModelStatus = Literal[
    "fetching", "loading", "loaded", "recovering", "failed", "unloading", "unloaded", "reloading", "poisoned"
]


class ModelInfo(msgspec.Struct, frozen=True):
    """An element of the neuron's `GET /models`. `status` is a string: peers of another age may know others.

    Every field is written, defaults too: what a peer must read (`status`, `devices`) may not hinge on its value.
    spec: how it was loaded, so that whoever unloads it can bring back the same thing (G4); None from older peers.
    pinned: an operator asked that nothing displaces it here. dtype: what its weights and cache are held as.
    fingerprint: of all that its answers depend on, beside the request; equal where another node gives the same answers.
    computed_by: device, kernels and library that the last bits of results depend on.
    """

    id: str
    harness: str = "candle"
    status: str = "loaded"
    devices: tuple[int, ...] = ()
    vram_used_mb: int | None = None
    capabilities: tuple[str, ...] = ()
    limit: ContextLimit | None = None
    cost: ModelCost | None = None
    tool_call: bool = False
    reasoning: bool = False
    servable: Servable | None = None
    progress: LoadProgress | None = None
    error: str | None = None
    created: int | None = None
    spec: ModelSpec | None = None
    pinned: bool = False
    dtype: str | None = None
    fingerprint: str | None = None
    computed_by: str | None = None


class ModelLocation(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where a model is, in the gateway's catalogue."""

    node: str
    status: str
    vram_estimate_mb: int | None = None
    progress: LoadProgress | None = None
    error: str | None = None


class BuildInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """`GET /version`. features: extras that are installed, and the fields of a load order that older builds lack
    (`load.dtype`)."""

    package_version: str
    git_sha: str = "unknown"
    git_dirty: bool = False
    build_timestamp: str | None = None
    python_version: str | None = None
    torch_version: str | None = None
    features: tuple[str, ...] = ()


def status_of(text: str) -> ModelStatus:
    """A peer's status string as one we know. Anything unknown reads as loaded, as the reference has it."""
    if text in _KNOWN_STATUSES:
        return text  # type: ignore[return-value]
    return "loaded"


_KNOWN_STATUSES = frozenset(
    (
        "fetching",
        "loading",
        "loaded",
        "recovering",
        "failed",
        "unloading",
        "unloaded",
        "reloading",
        "poisoned",
    )
)


def to_builtins(value: msgspec.Struct) -> dict[str, Any]:
    """A struct as plain JSON types, for callers that merge it into a larger document."""
    result: dict[str, Any] = msgspec.to_builtins(value)
    return result

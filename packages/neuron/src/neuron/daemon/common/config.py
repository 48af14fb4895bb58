"""`neuron.toml`: the daemon's configuration, field by field.

The `harness.candle` tables keep the key names of the reference so that its files load unchanged; keys of it that
have no meaning here are accepted and reported by `without_effect`, never silently swallowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from cortex_core.config import ConfigError, load_config
from cortex_core.fleet import ModelSpec
from cortex_core.fleet_secret import SecretMode, SecretReferences, absolute_places, secret_faults
from cortex_core.http_access import pattern_faults
from cortex_core.telemetry import TelemetrySection

HARNESS = "candle"
"""The one harness name peers know; it stands for our own engine."""

Seconds = Annotated[float, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Count = Annotated[int, msgspec.Meta(ge=0)]
Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]


class HarnessEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One entry of `harnesses`."""

    name: str


class SourceConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A registry that speaks the Hugging Face API. `auth_env` names the variable that holds the token."""

    endpoint: Annotated[str, msgspec.Meta(pattern="^https?://[^/]+")]
    auth_env: str | None = None
    cache_dir: str | None = None


class PrefixCacheConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Reuse of KV pages. The last two are accepted from files of the reference system and have no effect."""

    enabled: bool = True
    budget_mb: Count | None = None
    max_entries: Count | None = None


class ContextLimitConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """output_reserve_tokens: the most KV cache that admission reserves for the output of one choice. min_free_floor_mb:
    what a load leaves free of the host and of each of its devices."""

    enabled: bool | None = None
    target_prefill_latency_secs: float | None = None
    bootstrap_prefill_tok_per_sec: float | None = None
    activation_headroom_mb: int | None = None
    min_free_floor_mb: Count = 512
    output_reserve_tokens: Positive = 8192


class AdmissionConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many requests one model works on at once, how many wait, and how long they may wait.

    kv_max_wait_secs: for KV pages, where a seat is free (below the gateway's idle timeout of 300 s). max_per_principal:
    requests of one account or key, at work or waiting; 0 is no limit. anon_*: ceilings of requests without identity;
    None leaves one seat and one place to others, and 0 seats refuse them.
    """

    max_in_flight: Positive = 128
    max_queue_depth: Count = 256
    max_wait_secs: Seconds = 60.0
    max_per_principal: Count = 0
    anon_max_in_flight: Count | None = None
    anon_max_pending: Count | None = None
    kv_max_wait_secs: Seconds = 240.0


class ImageConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Accepted from files of the reference system; without effect."""

    te_device: str | None = None
    te_resident: bool | None = None
    max_dim: int | None = None


class EngineTables(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where models come from, and how many requests each takes: `[harness.candle]` in files, the reference's name."""

    hf_cache: str | None = None
    default_source: str = "huggingface"
    sources: dict[str, SourceConfig] = {}
    prefix_cache: PrefixCacheConfig = PrefixCacheConfig()
    context_limit: ContextLimitConfig = ContextLimitConfig()
    admission: AdmissionConfig = AdmissionConfig()
    image: ImageConfig = ImageConfig()


class HarnessConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[harness]`, by the name that files of the reference system have for the engine."""

    candle: EngineTables = EngineTables()


class EngineSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What every engine group is started with.

    kv_cache_mb sizes the KV cache of a device, kv_cache_tokens that of a CPU; None lets the engine decide.
    num_threads: torch threads on a CPU, of all ranks together. deterministic: answers do not depend on what else a
    model works on, at the price of speed. overlap: launch each step while the one before is computed; None does so on
    a GPU. cuda_graphs: record decode steps on a GPU. collective_timeout_s: how long ranks wait to meet, and for each
    other in one collective, where nothing else ends it. start_timeout_s: from spawn to the engine's first frame.
    load_stall_timeout_s: the longest silence while loading. load_deadline_s, load_min_mb_per_s: a load may take
    that long in all, and its weights at that rate on top (MiB/s, below any disk worth using). recovery_attempts:
    rebuilds in a row before a model counts as failed; a group that has lived for stable_after_s starts counting anew.
    weight_cache_mb: host memory for copies of checkpoints, from which models come back; 0 keeps none, None decides by
    the memory that is free at start. all_reduce: how the ranks of a model sum, by the fastest way for each size of
    message, or always by the library's collective.
    """

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: Positive | None = None
    kv_cache_mb: Positive | None = None
    kv_cache_tokens: Positive | None = None
    page_size: Positive = 16
    max_step_tokens: Positive = 2048
    max_running: Positive = 256
    num_threads: Positive | None = None
    deterministic: bool = False
    overlap: bool | None = None
    cuda_graphs: bool = True
    collective_timeout_s: Annotated[float, msgspec.Meta(gt=0)] = 120.0
    start_timeout_s: Seconds = 180.0
    load_stall_timeout_s: Seconds = 600.0
    load_deadline_s: Seconds = 300.0
    load_min_mb_per_s: Annotated[float, msgspec.Meta(gt=0)] = 50.0
    stop_grace_s: Seconds = 10.0
    recovery_attempts: Count = 5
    stable_after_s: Seconds = 60.0
    weight_cache_mb: Count | None = None
    all_reduce: Literal["auto", "library"] = "auto"


class ServerSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Access, limits and waits of the HTTP side. Times are seconds, sizes bytes.

    allowed_hosts: names it answers to beside addresses, `localhost`, `*.local`, names without a dot and those of its
    host. allow_origins: web pages that may use the API under `/v1`. secret: where that of the fleet is; secret_mode:
    what becomes of requests without it.
    write_timeout_s: how long a client may leave an answer unread before it counts as gone.
    stream_hold_s: how long a stream waits for its first token before its headers go out, so that what fails by
    then is still an HTTP error. unload_wait_s: how long an unload waits for requests in flight before it refuses.
    max_connections: of clients at once; None decides by the descriptors there are. watchdog_s: how long the event loop
    may be silent, where no systemd watches it.
    """

    max_connections: Positive | None = None
    allowed_hosts: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()
    secret: SecretReferences = ()
    secret_mode: SecretMode = "require"  # noqa: S105  (a mode)
    max_body_bytes: Positive = 32 * 2**20
    body_timeout_s: Seconds = 60.0
    write_timeout_s: Annotated[float, msgspec.Meta(gt=0)] = 300.0
    stream_hold_s: Seconds = 2.0
    ping_interval_s: Annotated[float, msgspec.Meta(gt=0)] = 5.0
    drain_grace_s: Seconds = 30.0
    unload_wait_s: Seconds = 10.0
    watchdog_s: Seconds = 30.0


class TextSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the processes may take that parse, render and tokenise requests and compile their grammars.

    workers: of one model, at the most; they are started as they are needed. cpu_s: processor seconds for a request of
    a few kB; each 10^6 bytes add 2. memory_mb: of one process, beyond what the model's tokenizer takes (MiB).
    """

    workers: Annotated[int, msgspec.Meta(ge=2, le=64)] = 4
    cpu_s: Annotated[float, msgspec.Meta(ge=0.1)] = 5.0
    memory_mb: Annotated[int, msgspec.Meta(ge=64)] = 1024


class PromptFilters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is taken out of a prompt before it is rendered; nothing but these ever is. Request log lines name them.

    claude_code_attribution: the line that Claude Code puts first in its system prompt. It changes from request to
    request, and every cached prefix would be lost with it.
    """

    claude_code_attribution: bool = True


class NeuronConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """state_dir: where the list of served models is kept; None decides by the environment, empty keeps none.

    debug_levers: whether a load may ask for an engine that fails in a chosen way, for tests.
    """

    host: str = "0.0.0.0"  # noqa: S104  (a daemon of a private network, as in the reference)
    port: Port = 13131
    harnesses: tuple[HarnessEntry, ...] = (HarnessEntry(HARNESS),)
    default_models: tuple[ModelSpec, ...] = ()
    state_dir: str | None = None
    harness: HarnessConfig = HarnessConfig()
    engine: EngineSection = EngineSection()
    server: ServerSection = ServerSection()
    text: TextSection = TextSection()
    prompt_filters: PromptFilters = PromptFilters()
    telemetry: TelemetrySection = TelemetrySection()
    debug_levers: bool = False

    @property
    def tables(self) -> EngineTables:
        return self.harness.candle

    @property
    def has_engine(self) -> bool:
        """False where the file lists harnesses and ours is not among them: inference then answers 503."""
        return any(entry.name == HARNESS for entry in self.harnesses)


def load_neuron_config(
    path: Path | str | None, *, environ: Mapping[str, str] | None = None, required: bool = True
) -> NeuronConfig:
    """Read `neuron.toml` and the `NEURON_` environment. Raises `ConfigError`."""
    config = load_config(NeuronConfig, path, env_prefix="NEURON_", environ=environ, required=required)
    server = config.server
    faults = pattern_faults(server.allowed_hosts, server.allow_origins, where="server")
    if faults := [*faults, *secret_faults(server.secret, where="server.secret")]:
        raise ConfigError([f"{path or '<environment>'}: {fault}" for fault in faults])
    if path is not None:
        secret = absolute_places(server.secret, Path(path).resolve().parent)
        config = msgspec.structs.replace(config, server=msgspec.structs.replace(server, secret=secret))
    tables = config.tables
    if tables.default_source != "huggingface" and tables.default_source not in tables.sources:
        known = ", ".join(["huggingface", *sorted(tables.sources)])
        raise ConfigError(
            [
                f"{path or '<environment>'}: harness.candle.default_source: no source `{tables.default_source}` "
                f"(known sources: {known})"
            ]
        )
    return config


def without_effect(config: NeuronConfig) -> list[str]:
    """Dotted keys that the file sets and this neuron does not act on, for a warning at start."""
    tables = config.tables
    ignored = [
        f"harness.candle.{table}.{field}"
        for table, section, used in (
            ("prefix_cache", tables.prefix_cache, {"enabled"}),
            ("context_limit", tables.context_limit, {"output_reserve_tokens", "min_free_floor_mb"}),
            ("image", tables.image, set[str]()),
        )
        for field in section.__struct_fields__
        if field not in used and getattr(section, field) is not None
    ]
    ignored += [f"harnesses: {entry.name}" for entry in config.harnesses if entry.name != HARNESS]
    return ignored

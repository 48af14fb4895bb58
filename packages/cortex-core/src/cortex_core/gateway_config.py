"""`cortex.toml`: the gateway's configuration, field by field.

It lives in core so that `cortex config check` needs no web framework.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from cortex_core.config import ConfigError, parse_config, read_text
from cortex_core.entitlements import EntitlementsSection, entitlement_faults
from cortex_core.fleet_secret import SecretReferences, absolute_places, secret_faults
from cortex_core.http_access import pattern_faults
from cortex_core.secret_references import SecretReference, absolute
from cortex_core.telemetry import TelemetrySection

Seconds = Annotated[float, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(ge=1)]


Http1Parser = Literal["auto", "h11", "httptools"]


class GatewaySection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Listeners, limits and waits of the gateway. Times are seconds, sizes bytes.

    allowed_hosts: names it answers to beside addresses, `localhost`, `*.local` and those of its host. allow_origins:
    web pages that may use the API. secret: where that of the fleet is, which goes to neurons and nowhere else.
    """

    listen: str = "0.0.0.0:31313"
    metrics_listen: str = "0.0.0.0:31314"
    max_connections: Positive | None = None
    allowed_hosts: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()
    secret: SecretReferences = ()
    max_body_bytes: Positive = 32 * 2**20
    max_body_memory_bytes: Positive = 2**30
    body_timeout_s: Seconds = 60.0
    write_timeout_s: Seconds = 120.0
    upstream_connect_timeout_s: Seconds = 5.0
    upstream_idle_timeout_s: Seconds = 300.0
    stream_silence_s: Seconds = 15.0
    stream_hold_s: Seconds = 1.0
    ping_interval_s: Seconds = 5.0
    load_wait_s: Seconds = 1800.0
    unstreamed_wait_s: Seconds = 300.0
    show_loading: bool = False
    drain_grace_s: Seconds = 30.0
    config_watch_s: Seconds = 1.0
    http1_parser: Http1Parser = "auto"
    watchdog_s: Seconds = 30.0


class PollSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Polling of the neurons. Times are seconds; `unhealthy_after` counts missed polls in a row."""

    interval_s: Annotated[float, msgspec.Meta(gt=0)] = 10.0
    timeout_s: Annotated[float, msgspec.Meta(gt=0)] = 5.0
    unhealthy_after: Positive = 3


class RoutingSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Among replicas: a request goes where its prompt is known, unless that node's load outweighs it.

    beta weighs relative load against the matched share of the prompt; 0 follows the prompt whatever the load.
    """

    affinity: bool = True
    beta: Annotated[float, msgspec.Meta(ge=0)] = 1.0


class BreakerSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """After so many failures in a row (0: never) a node gets no requests for a model until the back-off is over."""

    failures: Annotated[int, msgspec.Meta(ge=0)] = 5
    backoff_s: Annotated[float, msgspec.Meta(gt=0)] = 2.0
    max_backoff_s: Annotated[float, msgspec.Meta(gt=0)] = 60.0


class EvictionSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """min_residence_s: None means as long as the model took to load, up to half a minute."""

    strategy: Literal["lru", "priority"] = "lru"
    min_residence_s: Seconds | None = None
    patience_s: Seconds = 30.0
    idle_unload_s: Seconds = 0.0
    defrag_after_cycles: Annotated[int, msgspec.Meta(ge=0)] = 0


NeuronKind = Literal["neuron", "openai"]
HeaderName = Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9!#$%&'*+.^_`|~-]+$")]

NEVER_FORWARDED = frozenset(
    (
        "authorization",
        "x-api-key",
        "cookie",
        "host",
        "connection",
        "keep-alive",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "http2-settings",
        "expect",
        "content-length",
        "content-encoding",
        "accept-encoding",
        "x-request-id",
        "request-id",
    )
)
"""What no `forward_headers` may name: keys of this gateway's clients, and what belongs to one connection or body."""
NEVER_FORWARDED_PREFIXES = ("proxy-", "x-cortex-", "x-helexa-")


class NeuronEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One GPU host, or (kind `openai`) any server that speaks OpenAI chat.

    name is what metrics, pins and logs call it. api_key goes out as a bearer token, headers beside it; both say where
    the values are, `env:NAME` or `file:PATH`. extensions: translated requests may hold what local servers have added to
    the official API. forward_headers: those of its clients' headers that the server gets, beside the usual ones.
    secret: of a neuron, in place of the gateway's own; None is that one.
    """

    name: Annotated[str, msgspec.Meta(min_length=1)]
    endpoint: Annotated[str, msgspec.Meta(pattern="^https?://[^/]+")]
    kind: NeuronKind = "neuron"
    api_key: SecretReference | None = None
    headers: dict[HeaderName, SecretReference] = {}
    extensions: bool = True
    forward_headers: tuple[HeaderName, ...] = ()
    secret: SecretReferences | None = None


class PromptFiltersSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is taken out of prompts in front of a server of kind `openai`; neurons have the same switch of their own."""

    claude_code_attribution: bool = True


class CaptureSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The last so many exchanges are kept in memory (0: none): up to so many bytes of each, and of all of them."""

    exchanges: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 0
    exchange_bytes: Annotated[int, msgspec.Meta(ge=1024)] = 2**20
    total_bytes: Positive = 32 * 2**20


class GatewayConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`cortex.toml`."""

    gateway: GatewaySection = GatewaySection()
    poll: PollSection = PollSection()
    routing: RoutingSection = RoutingSection()
    breaker: BreakerSection = BreakerSection()
    eviction: EvictionSection = EvictionSection()
    entitlements: EntitlementsSection = EntitlementsSection()
    prompt_filters: PromptFiltersSection = PromptFiltersSection()
    telemetry: TelemetrySection = TelemetrySection()
    capture: CaptureSection = CaptureSection()
    neurons: tuple[NeuronEntry, ...] = ()
    models_config: str = "/etc/cortex/models.toml"


def load_gateway_config(
    path: Path | str | None, *, environ: Mapping[str, str] | None = None, required: bool = True
) -> GatewayConfig:
    """Read `cortex.toml`; relative paths in it are relative to the file, never to the working directory.

    Raises `ConfigError`, also for two neurons of one name, for a listener that is no host:port, and for keys that
    contradict themselves or each other.
    """
    text = read_text(path, required=required) if path is not None else ""
    return parse_gateway_config(text, path, environ=environ)


def parse_gateway_config(
    text: str, path: Path | str | None, *, environ: Mapping[str, str] | None = None
) -> GatewayConfig:
    """`load_gateway_config` on text already read."""
    config = parse_config(
        GatewayConfig,
        text,
        name=str(path) if path is not None else "<environment>",
        env_prefix="CORTEX_",
        environ=os.environ if environ is None else environ,
    )
    names = [neuron.name for neuron in config.neurons]
    faults = [
        f"{path}: neurons: the name `{name}` is used twice" for name in sorted({n for n in names if names.count(n) > 1})
    ]
    for key, value in (("listen", config.gateway.listen), ("metrics_listen", config.gateway.metrics_listen)):
        host, _, port = value.rpartition(":")
        if not host or not port.isdigit() or int(port) > 65535:
            faults.append(f"{path}: gateway.{key}: `{value}` is not host:port")
    faults.extend(
        f"{path}: neurons: `{neuron.name}` is a neuron: api_key, headers, extensions and forward_headers are for kind "
        "`openai`"
        for neuron in config.neurons
        if neuron.kind == "neuron"
        and (neuron.api_key is not None or neuron.headers or not neuron.extensions or neuron.forward_headers)
    )
    faults.extend(
        f"{path}: neurons: `{neuron.name}`: forward_headers: `{name}` may not go on"
        for neuron in config.neurons
        for name in neuron.forward_headers
        if name.lower() in NEVER_FORWARDED or name.lower().startswith(NEVER_FORWARDED_PREFIXES)
    )
    faults.extend(
        f"{path}: neurons: `{neuron.name}` is no neuron: the secret of the fleet does not go there"
        for neuron in config.neurons
        if neuron.kind != "neuron" and neuron.secret is not None
    )
    patterns = pattern_faults(config.gateway.allowed_hosts, config.gateway.allow_origins, where="gateway")
    faults.extend(f"{path}: {fault}" for fault in patterns)
    faults.extend(f"{path}: {fault}" for fault in secret_faults(config.gateway.secret, where="gateway.secret"))
    for neuron in config.neurons:
        places = secret_faults(neuron.secret or (), where=f"neurons: `{neuron.name}`: secret")
        faults.extend(f"{path}: {fault}" for fault in places)
    faults.extend(f"{path}: {fault}" for fault in entitlement_faults(config.entitlements))
    if faults:
        raise ConfigError(faults)
    scheme, _, store = config.entitlements.store.partition(":")
    if scheme == "sqlite" and path is not None and not Path(store).is_absolute():
        store = f"sqlite:{Path(path).resolve().parent / store}"
        config = msgspec.structs.replace(config, entitlements=msgspec.structs.replace(config.entitlements, store=store))
    if path is not None:
        folder = Path(path).resolve().parent
        config = msgspec.structs.replace(
            config,
            neurons=tuple(_with_absolute_files(neuron, folder) for neuron in config.neurons),
            gateway=msgspec.structs.replace(config.gateway, secret=absolute_places(config.gateway.secret, folder)),
        )
    models = Path(config.models_config)
    if not models.is_absolute() and path is not None:
        config = msgspec.structs.replace(config, models_config=str(Path(path).resolve().parent / models))
    return config


def _with_absolute_files(neuron: NeuronEntry, folder: Path) -> NeuronEntry:
    return msgspec.structs.replace(
        neuron,
        api_key=None if neuron.api_key is None else absolute(neuron.api_key, folder),
        headers={name: absolute(reference, folder) for name, reference in neuron.headers.items()},
        secret=None if neuron.secret is None else absolute_places(neuron.secret, folder),
    )

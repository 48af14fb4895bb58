"""OpenTelemetry traces, for either server: whether they are on, and the SDK that sends them.

The SDK is an optional dependency of the servers. It is imported in `open_span_export` and nowhere else in this package,
so that whoever leaves traces off neither needs it nor pays for it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import msgspec

from cortex_core.config import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Tracer

logger = logging.getLogger(__name__)

LOG_INTERVAL_S = 60.0
SHUTDOWN_TIMEOUT_S = 5.0


class TelemetrySection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where traces go. What is not set here is taken from the standard `OTEL_*` variables.

    traces: None is on where an endpoint is named. endpoint: of the collector, without `/v1/traces`. sample_ratio: of
    the traces that begin here; one that a client began is kept or left as the client decided.
    """

    traces: bool | None = None
    endpoint: Annotated[str, msgspec.Meta(pattern="^https?://[^/]+")] | None = None
    service_name: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    sample_ratio: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None


def traces_are_on(section: TelemetrySection, environ: Mapping[str, str]) -> bool:
    """The configuration decides where it says something; `OTEL_SDK_DISABLED` turns all off."""
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    if section.traces is not None:
        return section.traces
    if section.endpoint is not None:
        return True
    exporters = environ.get("OTEL_TRACES_EXPORTER", "").strip()
    if exporters:
        return "otlp" in [name.strip() for name in exporters.split(",")]
    return bool(environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"))


class SpanExport:
    """An open exporter. Spans of `tracer` are sent in the background; the queue is bounded, and what does not fit, or
    cannot be sent, is lost with a line in the log now and then."""

    def __init__(self, provider: TracerProvider, exporter: SpanExporter, tracer: Tracer) -> None:
        self._provider = provider
        self._exporter = exporter
        self.tracer = tracer

    def close(self, timeout_s: float = SHUTDOWN_TIMEOUT_S) -> None:
        """Send what is queued, but block no longer than that. What is left then is lost."""
        closing = threading.Thread(target=self._provider.shutdown, name="traces-shutdown", daemon=True)
        closing.start()
        closing.join(timeout_s)
        if closing.is_alive():
            logger.warning("traces: the last spans could not be sent within %g s", timeout_s)
            self._exporter.shutdown()  # wakes it up where it waits to try again


def open_span_export(
    section: TelemetrySection, *, service: str, version: str, package: str, environ: Mapping[str, str]
) -> SpanExport | None:
    """None where traces are off. service: the name where none is configured; package: whose extra `otel` is needed.

    Raises `ConfigError` where they are on and the SDK is not installed.
    """
    if not traces_are_on(section, environ):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
    except ImportError as exc:
        raise ConfigError(
            [
                f"traces are on, but OpenTelemetry is not installed ({exc}): pip install '{package}[otel]', "
                "or turn them off (`traces = false` under [telemetry], or OTEL_SDK_DISABLED=true)"
            ]
        ) from exc
    _quieten()
    if environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "").startswith("grpc"):
        logger.warning("traces: OTEL_EXPORTER_OTLP_PROTOCOL asks for gRPC; they are sent over HTTP all the same")
    attributes = {"service.version": version}
    is_named = environ.get("OTEL_SERVICE_NAME") or "service.name=" in environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    if section.service_name is not None or not is_named:
        attributes["service.name"] = section.service_name or service
    ratio = section.sample_ratio
    provider = TracerProvider(
        resource=Resource.create(attributes),
        sampler=None if ratio is None else ParentBased(TraceIdRatioBased(ratio)),
        shutdown_on_exit=False,
    )
    endpoint = section.endpoint
    exporter = OTLPSpanExporter(endpoint=None if endpoint is None else f"{endpoint.rstrip('/')}/v1/traces")
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return SpanExport(provider, exporter, provider.get_tracer("cortex", version))


class SeldomHandler(logging.Handler):
    """What the SDK says of a collector that cannot be reached, once in `interval_s` at most."""

    def __init__(self, interval_s: float = LOG_INTERVAL_S) -> None:
        super().__init__(logging.WARNING)
        self._interval_s = interval_s
        self._said_at: float | None = None
        self._num_left_out = 0

    def emit(self, record: logging.LogRecord) -> None:
        now = time.monotonic()
        if self._said_at is not None and now - self._said_at < self._interval_s:
            self._num_left_out += 1
            return
        left_out = f" ({self._num_left_out} lines like this were left out)" if self._num_left_out else ""
        self._said_at, self._num_left_out = now, 0
        logger.warning("traces: %s%s", record.getMessage(), left_out)


def _quieten() -> None:
    """The SDK logs every attempt, several times in a second, for as long as a collector is away."""
    sdk = logging.getLogger("opentelemetry")
    if not any(isinstance(handler, SeldomHandler) for handler in sdk.handlers):
        sdk.addHandler(SeldomHandler())
        sdk.propagate = False

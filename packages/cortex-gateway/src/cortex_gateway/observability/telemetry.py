"""Traces of this gateway where they are on; where they are off, nothing of OpenTelemetry is imported."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from importlib import metadata
from typing import TYPE_CHECKING

from cortex_core.telemetry import SpanExport, TelemetrySection, open_span_export

if TYPE_CHECKING:
    from cortex_gateway.observability.tracing import Tracing

PACKAGE = "helexa-cortex-gateway"


class Telemetry:
    """tracing: None where traces are off. Raises `ConfigError` where they are on and the SDK is not installed."""

    def __init__(self, section: TelemetrySection, *, clock: Callable[[], float]) -> None:
        version = metadata.version(PACKAGE)
        self._export: SpanExport | None = open_span_export(
            section, service="cortex-gateway", version=version, package=PACKAGE, environ=os.environ
        )
        self.tracing: Tracing | None = None
        if self._export is not None:
            from cortex_gateway.observability.tracing import Tracing

            self.tracing = Tracing(self._export.tracer, clock=clock)

    async def close(self) -> None:
        """What is queued is sent first, for a few seconds at most."""
        if self._export is not None:
            await asyncio.to_thread(self._export.close)

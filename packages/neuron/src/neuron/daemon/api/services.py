"""Services that the routes work with: built once by the daemon, passed explicitly."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cortex_core.fleet import BuildInfo
from cortex_core.serving.later import later
from cortex_core.serving.log_lines import RequestLines

from neuron.daemon.api.access import Access
from neuron.daemon.common.config import NeuronConfig
from neuron.daemon.hardware.monitor import HardwareMonitor
from neuron.daemon.lifecycle.manager import ModelManager
from neuron.daemon.lifecycle.startup_loads import Activator
from neuron.daemon.observability.metrics import Metrics

if TYPE_CHECKING:
    from neuron.daemon.observability.spans import RequestSpans


@dataclass(slots=True)
class Services:
    """port is set once the listener is bound, spans where telemetry is on. lines: which requests have a log line."""

    config: NeuronConfig
    manager: ModelManager
    hardware: HardwareMonitor
    activator: Activator
    metrics: Metrics
    build: BuildInfo
    access: Access
    spans: RequestSpans | None = None
    port: int = 0
    is_draining: bool = False
    began: float = field(default_factory=time.monotonic)
    instance: str = field(default_factory=lambda: secrets.token_hex(8))
    lines: RequestLines = field(default_factory=lambda: RequestLines(later=later))

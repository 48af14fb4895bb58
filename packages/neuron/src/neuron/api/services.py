"""What the routes work with: built once by the daemon, passed explicitly."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from cortex_core.fleet import BuildInfo

from neuron.api.metrics import Metrics
from neuron.config import NeuronConfig
from neuron.hardware.monitor import HardwareMonitor
from neuron.lifecycle.activation import Activator
from neuron.lifecycle.manager import ModelManager

if TYPE_CHECKING:
    from neuron.api.spans import RequestSpans

T = TypeVar("T")

_TEXT_THREADS = 2


@dataclass(slots=True)
class Services:
    """port is set once the listener is bound, spans where telemetry is on.

    `text_pool` renders and tokenises what would hold up the event loop.
    """

    config: NeuronConfig
    manager: ModelManager
    hardware: HardwareMonitor
    activator: Activator
    metrics: Metrics
    build: BuildInfo
    spans: RequestSpans | None = None
    port: int = 0
    is_draining: bool = False
    began: float = field(default_factory=time.monotonic)
    text_pool: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(_TEXT_THREADS, thread_name_prefix="text")
    )

    async def off_loop(self, function: Callable[[], T], *, is_long: bool) -> T:
        """The result of `function`, from a thread of the pool if it may take long."""
        if not is_long:
            return function()
        return await asyncio.get_running_loop().run_in_executor(self.text_pool, function)

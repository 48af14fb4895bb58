"""Models as the machine has decided, with engines and texts that only say what they are asked."""

from __future__ import annotations

from typing import Any

from cortex_core.fleet import ModelSpec
from neuron.daemon.admission.admission import Admission, AdmissionLimits
from neuron.daemon.lifecycle.served_model import ServedModel
from neuron.daemon.lifecycle.state_machine import ModelState
from neuron.protocol import EngineStats, Loaded

LOADED = Loaded(1, "Qwen3ForCausalLM", "bfloat16", 4096, 1000, 64, 16, 2**16, 2**30, 1.5)


class Group:
    """An engine group as a model asks it."""

    def __init__(self, stats: EngineStats | None = None) -> None:
        self.loaded = LOADED
        self.stats = stats or EngineStats()
        self.stalled: str | None = None
        self.retry_after = 7
        self.pids = (5, 6)


class Text:
    """A model's text as far as it is told of."""

    renders_tools = True
    can_reason = False

    class pool:
        unavailable: str | None = None


def model(phase: str = "loaded", *, stats: EngineStats | None = None, **state: Any) -> Any:
    limits = AdmissionLimits(max_in_flight=4, max_queue_depth=8, max_wait_s=60, kv_max_wait_s=60)
    made: Any = ServedModel("org/name", Admission(limits))
    made.state = ModelState(phase, ModelSpec("org/name"), **state)  # type: ignore[arg-type]
    if phase in ("loaded", "recovering", "unloading"):
        made.group, made.text = Group(stats), Text()
        made.engine_came_up(LOADED)
    return made

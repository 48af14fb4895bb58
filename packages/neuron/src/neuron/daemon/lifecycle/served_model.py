"""One model on this neuron: its state, what serves it, and what is told of it."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections.abc import Sequence
from typing import Literal

from cortex_core.errors import ApiError
from cortex_core.fleet import ContextLimit, ModelInfo, ModelLoad, Servable

from neuron.build_info import read_build_info
from neuron.daemon.admission.admission import Admission
from neuron.daemon.admission.capacity import KVCapacity, KVNeed, OutputEstimate
from neuron.daemon.common.config import HARNESS
from neuron.daemon.lifecycle.state_machine import ABSENT, ModelState
from neuron.daemon.memory.memory_fit import Fit
from neuron.daemon.memory.memory_ledger import Promise
from neuron.daemon.supervisor.engine_group import EngineGroup
from neuron.daemon.text_workers.served_text import ServedText
from neuron.protocol import EngineStats, Loaded

_MIB = 2**20


class ServedModel:
    """What `manager` keeps for one id. `state` is what the machine decided; the rest are the means."""

    def __init__(self, model_id: str, admission: Admission, *, output_reserve_tokens: int = 8192) -> None:
        self.id = model_id
        self.state: ModelState = ABSENT
        self.admission = admission
        admission.free_pages = self._pages_free_in_the_engine
        self.outputs = OutputEstimate(ceiling=output_reserve_tokens)
        self.fit: Fit | None = None
        self.weight_bytes = 0
        self.checkpoint_digest = ""
        self.fingerprint: str | None = None
        self.devices: tuple[int, ...] = ()
        self.text: ServedText | None = None
        self.group: EngineGroup | None = None
        self.created = int(time.time())
        self.is_pinned = False
        self.load_began = time.monotonic()
        self.load_seconds: float | None = None
        self.load_waiters: list[asyncio.Future[None]] = []
        self.unload_waiters: list[asyncio.Future[None]] = []
        self.fetch_cancelled = threading.Event()
        self.tasks: set[asyncio.Task[None]] = set()
        self.stopping: asyncio.Task[None] | None = None

    @property
    def loaded(self) -> Loaded | None:
        return None if self.group is None else self.group.loaded

    @property
    def stats(self) -> EngineStats:
        return EngineStats() if self.group is None else self.group.stats

    def engine_came_up(self, loaded: Loaded) -> None:
        """Admission learns of the cache that the engine has, which after a rebuild may be another."""
        self.admission.set_capacity(_capacity_of(loaded))
        self.fingerprint = self._fingerprint_with(loaded)

    def _fingerprint_with(self, loaded: Loaded) -> str | None:
        """Of what answers depend on beside the request: files, number formats, ranks, device, builds. None where the
        files were not looked at."""
        if self.group is None or not self.checkpoint_digest:
            return None
        config, build = self.group.config, read_build_info()
        formats = loaded.dtype, [each.item_bytes for each in loaded.cache_groups], config.deterministic
        ranks = config.tensor_parallel_size, config.shares
        builds = loaded.computed_by, build.package_version, build.git_sha
        text = repr((self.checkpoint_digest, formats, ranks, builds))
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def need(self, prompts: Sequence[tuple[int, int]], *, num_choices: int) -> KVNeed:
        """What a request needs of the KV cache. prompts: length of each, and the most output tokens of a choice."""
        capacity = self.admission.capacity
        if capacity is None:
            return KVNeed(0, 0)
        return capacity.need(prompts, num_choices=num_choices, expected_output=self.outputs.num_tokens)

    def promise(self) -> Promise | None:
        """The memory it has, or may yet take; None where it has not been estimated."""
        if self.fit is None or self.state.phase == "failed":
            return None
        stages: dict[str, Literal["here", "leaving"]] = {"loaded": "here", "unloading": "leaving"}
        return Promise(
            self.id,
            self.fit.bytes_on,
            stages.get(self.state.phase, "coming"),
            pids=() if self.group is None else tuple(self.group.pids),
            in_flight=self.admission.in_flight,
        )

    @property
    def max_model_len(self) -> int:
        """Positions a sequence may have; 0 before the first load."""
        return 0 if self.loaded is None else self.loaded.max_model_len

    def serving(self) -> tuple[ServedText, EngineGroup]:
        """Both sides of a model that takes requests, which wait while its engine is being rebuilt.

        Raises `ApiError`: why it does not take any now.
        """
        if self.state.phase not in ("loaded", "recovering") or self.text is None or self.group is None:
            raise self.unavailable()
        return self.text, self.group

    def unavailable(self) -> ApiError:
        """Why the model does not take requests now."""
        phase = self.state.phase
        if phase == "recovering" and self.group is not None:
            return ApiError(
                "overloaded",
                f"The model `{self.id}` is recovering from a failure of its engine. Please retry shortly.",
                code="engine_restarting",
                retry_after=self.group.retry_after,
            )
        if phase in ("fetching", "loading"):
            return ApiError(
                "overloaded", f"The model `{self.id}` is being loaded.", code="model_loading", retry_after=5
            )
        if phase == "unloading":
            return ApiError(
                "overloaded", f"The model `{self.id}` is being unloaded.", code="model_unloading", retry_after=5
            )
        return ApiError(
            "overloaded",
            f"The model `{self.id}` failed and was given up: {self.state.error or 'unknown reason'}",
            code="model_failed",
            retry_after=30,
        )

    # ------------------------------------------------------------------ for the outside

    def info(self) -> ModelInfo:
        """The element of `GET /models`."""
        state, loaded, text = self.state, self.loaded, self.text
        phase = "fetching" if state.phase == "absent" else state.phase
        window = None if loaded is None else loaded.max_model_len
        return ModelInfo(
            id=self.id,
            harness=HARNESS,
            status=phase,
            devices=self.devices,
            vram_used_mb=self._vram_used_mb(),
            capabilities=("text",) if text is not None else (),
            limit=None if window is None else ContextLimit(context=window, input=window, output=window),
            tool_call=text is not None and text.renders_tools,
            reasoning=text is not None and text.can_reason,
            servable=self._servable() if phase == "loaded" else None,
            progress=state.progress,
            error=state.error,
            created=self.created,
            spec=state.spec,
            pinned=self.is_pinned,
            dtype=None if loaded is None else loaded.dtype,
            fingerprint=None if loaded is None else self.fingerprint,
            computed_by=None if loaded is None else loaded.computed_by,
        )

    def load(self) -> ModelLoad:
        """The element of `GET /health`."""
        admission, stats = self.admission, self.stats
        capacity, rejected = admission.capacity, admission.rejected
        return ModelLoad(
            id=self.id,
            in_flight=admission.in_flight,
            queue_depth=admission.queue_depth,
            max_in_flight=admission.max_in_flight,
            max_queue_depth=admission.max_queue_depth,
            rejected_queue_full=rejected["queue_full"],
            rejected_timeout=rejected["wait_timeout"],
            rejected_per_principal=rejected["per_principal"],
            anon_in_flight=admission.anon_in_flight,
            anon_max_in_flight=admission.anon_max_in_flight,
            rejected_anon_yield=rejected["anon_yield"],
            rejected_kv_timeout=rejected["kv_timeout"],
            rejected_kv_unservable=rejected["kv_unservable"],
            kv_budget_mb=0 if capacity is None else capacity.megabytes(capacity.num_pages),
            kv_available_mb=0 if capacity is None else capacity.megabytes(self._free_pages()),
            tok_s_prefill=_rate(stats.prefill_tokens, stats.prefill_seconds),
            tok_s_decode=_rate(stats.decode_tokens, stats.decode_seconds),
            idle_s=admission.idle_s,
            status="stalled" if self._stalled else self.state.phase,
            error=self._stalled or self.state.error,
        )

    @property
    def _stalled(self) -> str | None:
        """Why a loaded engine seems stuck, in the moments before it is killed."""
        return None if self.group is None or self.state.phase != "loaded" else self.group.stalled

    def _free_pages(self) -> int:
        """Pages that are neither promised to a request nor held by one in the engine."""
        promised = self.admission.available_pages
        return min(promised, self.stats.free_pages) if self.stats.total_pages else promised

    def _pages_free_in_the_engine(self) -> int | None:
        """None while that says nothing: before the first step, and while a sequence waits for pages."""
        stats = self.stats
        return stats.free_pages if stats.total_pages and not stats.waiting else None

    def _servable(self) -> Servable | None:
        """What the smallest of requests would be told; None while that is not known. A cache that is full of answers
        is no reason: they end (F26)."""
        if self._stalled:
            return Servable(ok=False, reason="engine_stalled", detail=self._stalled)
        if self.text is not None and self.text.pool.unavailable is not None:
            return Servable(ok=False, reason="text_unavailable", detail=self.text.pool.unavailable)
        if self.admission.capacity is None:
            return None
        refusal = self.admission.capacity.refusal(self.need([(1, 1)], num_choices=1))
        if refusal is None:
            return Servable(ok=True)
        return Servable(ok=False, reason=refusal.code, detail=refusal.message)

    def _vram_used_mb(self) -> int | None:
        """Weights and KV cache; None on a CPU, where it is no device memory."""
        loaded = self.loaded
        if loaded is None or not self.devices:
            return None
        kv_bytes = loaded.num_pages * loaded.page_size * loaded.kv_bytes_per_token
        return (loaded.weight_bytes + kv_bytes) // _MIB


def _capacity_of(loaded: Loaded) -> KVCapacity:
    return KVCapacity(loaded.num_pages, loaded.page_size, loaded.kv_bytes_per_token, loaded.cache_groups)


def _rate(tokens: int, seconds: float) -> float:
    return round(tokens / seconds, 1) if seconds > 0 else 0.0

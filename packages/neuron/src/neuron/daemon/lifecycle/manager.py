"""Carries out what `machine.decide` decides, for every model of this neuron. All of it on the event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

import msgspec
from cortex_core.errors import ApiError, model_not_found
from cortex_core.fleet import LoadProgress, ModelInfo, ModelLoad, ModelSpec

from neuron.checkpoint.preflight import check_spec, refusal
from neuron.daemon.admission.admission import Admission
from neuron.daemon.common.config import NeuronConfig
from neuron.daemon.common.daemon_thread import run_in_daemon_thread
from neuron.daemon.hardware.monitor import HardwareMonitor
from neuron.daemon.hub.download import FetchCancelled
from neuron.daemon.hub.sources import Sources
from neuron.daemon.lifecycle import state_machine
from neuron.daemon.lifecycle.engine_settings import admission_limits, engine_config
from neuron.daemon.lifecycle.inspection import Inspection, inspect_in_process
from neuron.daemon.lifecycle.load_errors import debug_levers_off, load_error, shutting_down
from neuron.daemon.lifecycle.parallelism import check_parallelism
from neuron.daemon.lifecycle.progress import ProgressClock, Watchers, load_deadline_s
from neuron.daemon.lifecycle.served_model import ServedModel
from neuron.daemon.lifecycle.state_file import ServedModels
from neuron.daemon.memory.memory_ledger import MemoryLedger
from neuron.daemon.memory.weight_cache import WeightCache
from neuron.daemon.supervisor.engine_group import EngineGroup, GroupDied, GroupEvent, GroupLoaded, GroupLoading
from neuron.daemon.supervisor.process_group import LaunchSettings, WorkerCommand, worker_command
from neuron.daemon.supervisor.restart_policy import RestartPolicy
from neuron.daemon.text_workers.host_process import TextLoadError
from neuron.daemon.text_workers.served_text import ServedText
from neuron.daemon.text_workers.settings import TextSettings
from neuron.daemon.text_workers.worker_handle import LostReason
from neuron.protocol import EngineConfig, EngineProgress

logger = logging.getLogger(__name__)

# Tokenizers and templates that are read at a time: each may take gigabytes before it is refused.
_TEXTS_AT_ONCE = 3


class ModelManager:
    """Loads, serves and unloads models.

    runtime_dir: a private folder for sockets. command makes the argument list of a worker process. served: the list of
    what is served, on disk. memory decides whether a load fits. weights keeps copies of checkpoints in host memory.
    Attributes: on_loaded is called once per load (not per recovery), on_text_end for each text worker that ended with
    the request it was at.
    """

    def __init__(
        self,
        config: NeuronConfig,
        sources: Sources,
        *,
        runtime_dir: Path,
        hardware: HardwareMonitor,
        memory: MemoryLedger,
        command: WorkerCommand = worker_command,
        served: ServedModels,
        weights: WeightCache,
    ) -> None:
        engine = config.engine
        self._config = config
        self._sources = sources
        self._devices = hardware.discovery.devices
        self._free_mb = hardware.free_mb
        self._memory = memory
        self._fitting = asyncio.Lock()
        self._opening_texts = asyncio.Semaphore(_TEXTS_AT_ONCE)
        self._cuda_unavailable_reason = hardware.discovery.cuda_unavailable_reason
        self._models: dict[str, ServedModel] = {}
        self._clocks: defaultdict[str, ProgressClock] = defaultdict(ProgressClock)
        self._watchers: defaultdict[str, Watchers] = defaultdict(Watchers)
        self.weights = weights
        self._served = served
        self.on_loaded: Callable[[ServedModel], None] = lambda model: None
        self.on_text_end: Callable[[ServedModel, LostReason], None] = lambda model, reason: None
        self._is_closing = False
        self._text_settings = TextSettings(
            max_workers=config.text.workers,
            cpu_s=config.text.cpu_s,
            memory_bytes=config.text.memory_mb * 2**20,
            drops_attribution=config.prompt_filters.claude_code_attribution,
        )
        self._policy = RestartPolicy(engine.recovery_attempts, engine.stable_after_s)
        self._launch = LaunchSettings(
            runtime_dir=runtime_dir,
            command=command,
            start_timeout_s=engine.start_timeout_s,
            stall_timeout_s=engine.load_stall_timeout_s,
            stop_grace_s=engine.stop_grace_s,
        )

    # ------------------------------------------------------------------ what is here

    def models(self) -> list[ModelInfo]:
        return [model.info() for model in self._models.values()]

    def loads(self) -> list[ModelLoad]:
        return [model.load() for model in self._models.values() if model.group is not None]

    def all(self) -> list[ServedModel]:
        return list(self._models.values())

    def find(self, model_id: str) -> ServedModel | None:
        """The model of an id, in whatever form its source may be written."""
        model = self._models.get(model_id)
        if model is not None:
            return model
        try:
            return self._models.get(self._sources.public_id(model_id))
        except ApiError:
            return None

    def get(self, model_id: str) -> ServedModel:
        """`find`, but what is not here raises `ApiError` `model_not_found`."""
        model = self.find(model_id)
        if model is None:
            raise model_not_found(model_id)
        return model

    def with_text(self, model_id: str) -> tuple[ServedModel, ServedText]:
        """A model and its text side, which serves also while its engine does not. Raises `ApiError`."""
        model = self.get(model_id)
        if model.text is None:
            raise model.unavailable()
        return model, model.text

    # ------------------------------------------------------------------ load and unload

    async def load(self, spec: ModelSpec) -> None:
        """Returns when the model is loaded. One load runs, however many ask; it outlives whoever asked.

        Raises `ApiError`: why it cannot be, or was not, loaded.
        """
        if self._is_closing:
            raise shutting_down()
        model_id = self._sources.public_id(spec.model_id)
        model = self._models.get(model_id)
        if model is None or model.state.phase in ("absent", "failed"):
            if self._cuda_unavailable_reason is not None:
                raise ApiError("overloaded", self._cuda_unavailable_reason, code="cuda_unavailable")
            check_spec(spec, self._devices)
            check_parallelism(spec, self._devices)
            if spec.debug and not self._config.debug_levers:
                raise debug_levers_off()
        if model is None:
            model = self._models[model_id] = self._new_model(model_id)
        await self._order(model, state_machine.LoadRequested(spec), model.load_waiters)

    async def unload(self, model_id: str) -> None:
        """Returns when every process of the model is gone. Raises `ApiError`: not here, or still in use."""
        model = self.find(model_id)
        if model is None:
            self._served.remove(self._sources.public_id(model_id))  # it may be one that did not come back at start
            await self._served.flushed()
            raise ApiError(
                "not_found",
                f"The model `{model_id}` is not loaded here.",
                code="model_not_found",
                param="model_id",
                extras={"model_id": model_id},
            )
        await self._order(model, state_machine.UnloadRequested(), model.unload_waiters)

    async def _order(self, model: ServedModel, event: state_machine.Event, waiters: list[asyncio.Future[None]]) -> None:
        """Post an order and wait for its answer, which is given once it would also survive the daemon's death."""
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiters.append(answer)
        try:
            self._post(model, event)
            await answer
        finally:
            if answer in waiters:
                waiters.remove(answer)  # whoever asked has left; what was asked for goes on
        await self._served.flushed()

    async def follow(self, model_id: str, *, beat_s: float) -> AsyncIterator[ModelInfo | None]:
        """What `/models` says of a model, whenever it changes, until it neither comes nor goes any more.

        None is a beat: nothing changed for `beat_s`. A model that is not here (any more) ends it without a word.
        """
        shown: object = None
        while (model := self.find(model_id)) is not None:
            state = model.state
            look = (state.phase, state.progress, state.error)
            yield None if look == shown else model.info()
            shown = look
            if state.phase in ("loaded", "failed"):
                return
            if model.state is state:  # else it changed while the reader was busy
                await self._watchers[model.id].changed(beat_s)

    def close_admission(self) -> None:
        """From now on every request and load is refused with `shutting_down`; who waits in a queue is told so."""
        self._is_closing = True
        for model in self._models.values():
            model.admission.close(shutting_down)

    async def drained(self) -> None:
        """Wait until no request is in flight on any model."""
        for model in list(self._models.values()):
            await model.admission.drained()

    def fail_requests(self) -> None:
        """End every request in flight with `shutting_down`."""
        for model in self._models.values():
            if model.group is not None:
                model.group.fail_requests(lambda _: shutting_down())

    async def shutdown(self, *, timeout_s: float) -> None:
        """Stop every model, each within `timeout_s`."""
        self.close_admission()

        async def stop(model: ServedModel) -> None:
            try:
                async with asyncio.timeout(timeout_s):
                    await asyncio.shield(self._stop(model))
            except TimeoutError:
                logger.error("model not stopped in time model=%s", model.id)
            self._answer(model.load_waiters, shutting_down())
            self._answer(model.unload_waiters, None)

        await asyncio.gather(*(stop(model) for model in list(self._models.values())))
        self._models.clear()

    # ------------------------------------------------------------------ events in, effects out

    def _post(self, model: ServedModel, event: state_machine.Event) -> None:
        before = model.state
        model.state, effects = state_machine.decide(before, event)
        if model.state.phase != before.phase:
            logger.info(
                "model state model=%s from=%s to=%s%s",
                model.id,
                before.phase,
                model.state.phase,
                f" reason={model.state.error}" if model.state.error else "",
            )
        if model.state is not before and model.id in self._watchers:
            self._watchers.pop(model.id).wake()
        for effect in effects:
            self._perform(model, effect)

    def _perform(self, model: ServedModel, effect: state_machine.Effect) -> None:
        if isinstance(effect, state_machine.StartFetch):
            if not model.state.fetch_failures:
                model.load_began, model.load_seconds = time.monotonic(), None
            self._spawn(model, self._fetch(model, effect.spec))
        elif isinstance(effect, state_machine.RetryLater):
            self._spawn(model, self._retry_later(model, effect.delay_s))
        elif isinstance(effect, state_machine.StartEngine):
            assert model.state.spec is not None
            self._start_engine(model, model.state.spec, effect.path)
        elif isinstance(effect, state_machine.OpenAdmission):
            if not self._is_closing:
                model.admission.open()
        elif isinstance(effect, state_machine.Drain):
            self._spawn(model, self._drain(model))
        elif isinstance(effect, state_machine.Stop):
            self._stop(model).add_done_callback(lambda _: self._post(model, state_machine.Stopped()))
        elif isinstance(effect, state_machine.AnswerLoads):
            self._answer(model.load_waiters, effect.error)
        elif isinstance(effect, state_machine.AnswerUnloads):
            self._answer(model.unload_waiters, effect.error)
        elif isinstance(effect, state_machine.Remember):
            assert model.state.spec is not None
            self._served.add(model.id, model.state.spec)
        elif isinstance(effect, state_machine.Disown):
            self._served.remove(model.id)
        else:
            self._models.pop(model.id, None)
            self._clocks.pop(model.id, None)

    @staticmethod
    def _spawn(model: ServedModel, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        model.tasks.add(task)
        task.add_done_callback(model.tasks.discard)

    @staticmethod
    def _answer(waiters: list[asyncio.Future[None]], error: ApiError | None) -> None:
        for waiter in waiters:
            if waiter.done():
                continue  # the client left; the load goes on without it
            if error is None:
                waiter.set_result(None)
            else:
                waiter.set_exception(error)
        waiters.clear()

    # ------------------------------------------------------------------ effects

    async def _fetch(self, model: ServedModel, spec: ModelSpec) -> None:
        loop = asyncio.get_running_loop()
        cancelled = model.fetch_cancelled = threading.Event()

        def post(progress: LoadProgress) -> None:
            if not cancelled.is_set():
                self._progressed(model, progress)

        def on_progress(progress: LoadProgress) -> None:
            if not cancelled.is_set():
                loop.call_soon_threadsafe(post, progress)

        event: state_machine.Event
        try:
            path = await run_in_daemon_thread(
                lambda: self._sources.fetch(
                    spec,
                    on_progress=on_progress,
                    cancelled=cancelled,
                    before_weights=lambda hf_config, size: self._check_size(model.id, spec, hf_config, size),
                ),
                name=f"fetch {model.id}",
            )
            inspection = await run_in_daemon_thread(
                lambda: inspect_in_process(spec, path, cancelled=cancelled), name=f"inspection {model.id}"
            )
            model.weight_bytes, model.checkpoint_digest = inspection.weight_bytes, inspection.digest
            await self._fit(model, spec, path, inspection)
            model.text = await self._open_text(model, path)
            event = state_machine.Fetched(path)
        except ApiError as exc:
            logger.warning("fetch failed model=%s code=%s reason=%s", model.id, exc.code, exc.message)
            event = state_machine.FetchFailed(exc)
        except FetchCancelled:
            return
        except Exception as exc:
            logger.exception("fetch failed model=%s", model.id)
            event = state_machine.FetchFailed(
                refusal("repo_fetch_failed", f"`{model.id}` could not be fetched: {exc}", model_id=model.id)
            )
        self._post(model, event)

    def _progressed(self, model: ServedModel, progress: LoadProgress) -> None:
        self._post(model, state_machine.Progressed(self._clocks[model.id].feed(progress, time.monotonic())))

    def _check_size(self, model_id: str, spec: ModelSpec, hf_config: Mapping[str, Any], num_bytes: int) -> None:
        """Refuse a download that this host could never load. Blocks. Raises `ApiError`."""
        self._memory.check_size(self._engine_config(model_id, spec, Path()), hf_config, num_bytes)

    async def _fit(self, model: ServedModel, spec: ModelSpec, path: Path, inspection: Inspection) -> None:
        """Refuse a load that memory has no room for, before anything is started. One at a time: what fits is promised
        before the next one looks. Raises `ApiError`."""
        ledger = self._memory
        async with self._fitting:
            model.fit = None
            config = self._engine_config(model.id, spec, path)
            promises = [promise for other in self._models.values() if (promise := other.promise()) is not None]
            model.fit = await run_in_daemon_thread(
                lambda: ledger.fit(config, promises, inspection.model, inspection.tensors), name=f"fit {model.id}"
            )
            if model.fit is not None and model.fit.reclaim_bytes:
                self.weights.give_up(model.fit.reclaim_bytes, keep=path)

    async def _retry_later(self, model: ServedModel, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        self._post(model, state_machine.RetryDue())

    async def _open_text(self, model: ServedModel, path: Path) -> ServedText:
        """Its tokenizer and template, read by a process of its own. Raises `ApiError` 422."""
        await self._close_text(model)
        try:
            async with self._opening_texts:
                return await ServedText.open(
                    str(path),
                    self._text_settings,
                    label=model.id,
                    on_end=lambda reason: self.on_text_end(model, reason),
                )
        except TextLoadError as exc:
            raise refusal("bad_checkpoint", f"`{model.id}` cannot be served: {exc}", model_id=model.id) from exc

    @staticmethod
    async def _close_text(model: ServedModel) -> None:
        text, model.text = model.text, None
        if text is not None:
            await text.close()

    def _start_engine(self, model: ServedModel, spec: ModelSpec, path: Path) -> None:
        assert model.text is not None
        config = self._engine_config(model.id, spec, path) if model.fit is None else model.fit.config
        config = msgspec.structs.replace(config, tokenizer_json=model.text.tokenizer_json)
        model.devices = config.devices
        launch = msgspec.structs.replace(
            self._launch,
            load_timeout_s=load_deadline_s(
                model.weight_bytes,
                floor_s=self._config.engine.load_deadline_s,
                min_bytes_per_s=self._config.engine.load_min_mb_per_s * 2**20,
            ),
        )
        group = EngineGroup(
            config,
            launch,
            on_event=lambda event: self._on_group_event(model, group, event),
            policy=self._policy,
            weights=lambda: self.weights.descriptors(path),
        )
        model.group = group
        group.start()

    def _engine_config(self, model_id: str, spec: ModelSpec, path: Path) -> EngineConfig:
        return engine_config(
            self._config, spec, model_id=model_id, path=path, devices=self._devices, free_mb=self._free_mb
        )

    def _on_group_event(self, model: ServedModel, group: EngineGroup, event: GroupEvent) -> None:
        if model.group is not group:
            return  # of a group that has been stopped
        if isinstance(event, GroupLoading):
            self._progressed(model, _fleet_progress(event.progress))
        elif isinstance(event, GroupLoaded):
            model.engine_came_up(event.loaded)
            if model.load_seconds is None:
                model.load_seconds = time.monotonic() - model.load_began
                self.on_loaded(model)
                self.weights.loaded(Path(group.config.path), model.id)
            _log_loaded(model, event)
            self._post(model, state_machine.EngineUp())
        elif isinstance(event, GroupDied):
            self._post(model, state_machine.EngineDied(event.reason))
        else:
            if model.load_seconds is None:  # nobody has seen it serve, and nobody will
                self._spawn(model, self._close_text(model))
            self._post(model, state_machine.EngineFailed(load_error(model.id, event)))

    async def _drain(self, model: ServedModel) -> None:
        model.admission.close(lambda: model.unavailable())
        try:
            async with asyncio.timeout(self._config.server.unload_wait_s):
                await model.admission.drained()
        except TimeoutError:
            self._post(model, state_machine.DrainTimedOut(model.admission.in_flight))
            return
        self._post(model, state_machine.Drained())

    def _stop(self, model: ServedModel) -> asyncio.Task[None]:
        """Stop everything of a model, once: whoever asks while it is going on waits for the same end."""
        if model.stopping is None or model.stopping.done():
            model.stopping = asyncio.create_task(self._stop_now(model))
        return model.stopping

    async def _stop_now(self, model: ServedModel) -> None:
        model.fetch_cancelled.set()
        model.admission.close(lambda: model.unavailable())
        for task in list(model.tasks):
            task.cancel()
        group, model.group = model.group, None
        await self._close_text(model)
        if group is not None:
            was_loaded = group.loaded is not None
            await group.stop()
            if was_loaded and not self._is_closing:
                self.weights.unloaded(Path(group.config.path), model.id)

    def _new_model(self, model_id: str) -> ServedModel:
        tables = self._config.tables
        admission = Admission(admission_limits(tables.admission))
        return ServedModel(model_id, admission, output_reserve_tokens=tables.context_limit.output_reserve_tokens)


def _fleet_progress(progress: EngineProgress) -> LoadProgress:
    return LoadProgress(progress.phase, progress.bytes_done, progress.bytes_total)


def _log_loaded(model: ServedModel, event: GroupLoaded) -> None:
    loaded = event.loaded
    logger.info(
        "construction complete model=%s architecture=%s dtype=%s devices=%s max_model_len=%d kv_tokens=%d "
        "kv_bytes_per_token=%d weight_mb=%d load_s=%.1f read_gb_per_s=%.2f from=%s epoch=%d",
        model.id,
        loaded.architecture,
        loaded.dtype,
        ",".join(map(str, model.devices)) or "cpu",
        loaded.max_model_len,
        loaded.num_pages * loaded.page_size,
        loaded.kv_bytes_per_token,
        loaded.weight_bytes // 2**20,
        model.load_seconds or loaded.load_seconds,
        loaded.read_bytes / loaded.read_seconds / 1e9 if loaded.read_seconds else 0.0,
        "memory" if loaded.read_from_memory else "files",
        loaded.epoch,
    )

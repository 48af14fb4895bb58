"""One loaded model's engine group: kept alive from the config it was loaded with, until it is stopped."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Literal

import msgspec
from cortex_core.errors import ApiError

from neuron.daemon.supervisor import fault_attribution
from neuron.daemon.supervisor.channel import ChannelClosed, EngineChannel
from neuron.daemon.supervisor.errors import (
    EngineLoadError,
    engine_fault,
    engine_lost,
    engine_restarting,
    engine_stopped,
    sequence_error,
)
from neuron.daemon.supervisor.generation import Generation, LiveSequence
from neuron.daemon.supervisor.process_group import LaunchSettings, ProcessGroup
from neuron.daemon.supervisor.restart_policy import RestartPolicy
from neuron.daemon.supervisor.watchdog import Watchdog
from neuron.protocol import (
    Cancel,
    EngineConfig,
    EngineProgress,
    EngineStats,
    Generate,
    Loaded,
    Ping,
    SequenceUpdate,
    StepOutput,
)

logger = logging.getLogger(__name__)

PING_INTERVAL_S = 10.0
# From asking for stacks to SIGKILL: for them to reach the log, and for a group that was only slow to show it.
_STACKS_S = 1.0

# A first load whose process ends without saying why is tried again so often; one that is refused is not.
_FIRST_LOAD_RETRIES = 1

GroupState = Literal["new", "loading", "loaded", "recovering", "failed", "stopped"]


class GroupLoading(msgspec.Struct, frozen=True):
    """The group is coming up, for the first time or again."""

    progress: EngineProgress


class GroupLoaded(msgspec.Struct, frozen=True):
    """The group serves, for the first time or again."""

    loaded: Loaded


class GroupDied(msgspec.Struct, frozen=True):
    """A loaded group ended, or a rebuild failed; the next rebuild starts in `retry_in_s` seconds."""

    reason: str
    retry_in_s: float


class GroupFailed(msgspec.Struct, frozen=True):
    """Given up: the first load failed, or too many rebuilds in a row."""

    kind: str
    reason: str


GroupEvent = GroupLoading | GroupLoaded | GroupDied | GroupFailed


class _Ending(msgspec.Struct, frozen=True):
    kind: str
    reason: str
    lived_s: float


class EngineGroup:
    """Loads, serves, and rebuilds itself when it dies.

    `start` returns at once; what happens is told to `on_event`. A request outlives its engine: what was in flight when
    a group died goes on in its successor where it was, and what comes meanwhile waits for it. Only where no successor
    comes up do requests end, with the retryable `engine_restarting`. `stalled`: while a group is loaded but seems
    stuck, why; it is about to be killed. weights: asked before each start of the processes, descriptors of copies of
    the checkpoint's files, by name, for them to inherit.
    """

    def __init__(
        self,
        config: EngineConfig,
        settings: LaunchSettings,
        *,
        on_event: Callable[[GroupEvent], None],
        policy: RestartPolicy | None = None,
        ping_interval_s: float = PING_INTERVAL_S,
        weights: Callable[[], Awaitable[dict[str, int]]] | None = None,
    ) -> None:
        self.config = config
        self.state: GroupState = "new"
        self.loaded: Loaded | None = None
        self.stats = EngineStats()
        self.num_restarts = 0
        self.stalled: str | None = None
        self._name = secrets.token_hex(8)
        self._settings = settings
        self._on_event = on_event
        self._policy = policy or RestartPolicy()
        self._ping_interval_s = ping_interval_s
        self._weights = weights
        self._process_group: ProcessGroup | None = None
        self._watchdog: Watchdog | None = None
        # Sequences by number that no engine holds now, and by request id those that one holds.
        self._waiting: dict[int, LiveSequence] = {}
        self._in_engine: dict[int, LiveSequence] = {}
        self._next_number = 1
        self._next_request_id = 1
        self._task: asyncio.Task[None] | None = None
        self._failures = 0
        self._is_stopping = False
        self._load_seconds = 0.0
        self._retry_in_s: float | None = 0.0

    # ------------------------------------------------------------------ life

    def start(self) -> None:
        """Begin to load. Once only."""
        assert self._task is None
        self.state = "loading"
        self._task = asyncio.create_task(self._run(), name=f"engine-group {self.config.model_id}")
        self._task.add_done_callback(self._on_task_done)

    async def stop(self) -> None:
        """End every request and every process. Returns when all are gone; the group cannot be started again."""
        was_loaded = self.state == "loaded"
        self._is_stopping = True
        self.state = "stopped"
        self.fail_requests(lambda _: engine_stopped())
        process_group = self._process_group
        if was_loaded and process_group is not None:
            await process_group.stop()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks that were started last."""
        return [] if self._process_group is None else self._process_group.pids

    @property
    def num_live(self) -> int:
        """Sequences in flight, those that wait for an engine included."""
        return len(self._waiting) + len(self._in_engine)

    # ------------------------------------------------------------------ requests

    async def generate(
        self, requests: Sequence[Generate], *, choices: Sequence[int] | None = None, heartbeat_s: float | None = None
    ) -> Generation:
        """Start the sequences of one request; their `request_id`s are assigned here.

        choices: the index of each in the answer, 0, 1, 2 … if not given.
        While the group recovers they wait, and start once it is up. Raises `ApiError` (`engine_restarting`) where
        there is no engine and none is being rebuilt.
        """
        with suppress(ChannelClosed):
            await self._channel_now().writable()
        if self.state not in ("loaded", "recovering"):
            raise engine_restarting(self.retry_after)
        generation = Generation(self._forget, heartbeat_s=heartbeat_s)
        for choice, request in zip(choices or range(len(requests)), requests, strict=True):
            sequence = LiveSequence(self._next_number, choice, request, generation)
            self._next_number += 1
            self._waiting[sequence.number] = sequence
            generation.add(sequence)
        self._submit()
        return generation

    @property
    def retry_after(self) -> int:
        """Seconds until a retry makes sense, while the group is down: the pause, and a load like the last one."""
        return self._policy.retry_after(self._retry_in_s or 0.0, self._load_seconds)

    def fail_requests(self, error: Callable[[Generation], ApiError]) -> None:
        """End every request in flight with an error of its own, as when the daemon's time to drain is over."""
        live = [*self._waiting.values(), *self._in_engine.values()]
        for generation in {id(sequence.generation): sequence.generation for sequence in live}.values():
            generation.fail(error(generation))

    # ------------------------------------------------------------------ the loop of its life

    async def _run(self) -> None:
        while True:
            descriptors = {} if self._weights is None else await self._weights()
            config = msgspec.structs.replace(self.config, epoch=self.num_restarts, weight_descriptors=descriptors)
            process_group = ProcessGroup(
                config, self._settings, on_progress=self._on_progress, on_step=self._on_step, on_pong=self._on_pong
            )
            self._process_group = process_group
            try:
                ending = await self._live_through(process_group)
            finally:
                await process_group.kill()
            if self._is_stopping:
                return
            if self.loaded is None:
                if ending.kind != "died" or self.num_restarts >= _FIRST_LOAD_RETRIES:
                    self._give_up(ending.kind, ending.reason)
                    return
                logger.error("engine group died while loading, and is tried again: %s", ending.reason)
                self.num_restarts += 1
                continue
            logger.error(
                "engine group died model=%s epoch=%d lived_s=%.1f failures=%d reason=%s exit=%s",
                config.model_id,
                config.epoch,
                ending.lived_s,
                self._failures,
                ending.reason,
                process_group.describe_exits(),
            )
            if self._retry_in_s is None:
                self._give_up(ending.kind, f"{ending.reason} ({self._failures} failures in a row)")
                return
            self.num_restarts += 1
            self.stats = EngineStats()
            await asyncio.sleep(self._retry_in_s)

    async def _live_through(self, process_group: ProcessGroup) -> _Ending:
        """From spawn to the end, whatever it is. When this returns, its sequences wait for the next one."""
        began = time.monotonic()
        try:
            loaded = await process_group.load()
        except EngineLoadError as exc:
            if exc.kind in ("stalled", "load_timeout"):
                process_group.dump_stacks()
                await asyncio.sleep(_STACKS_S)
            if self.loaded is not None:
                self._failures = self._policy.failures_after(self._failures, 0.0)
                self._announce_death(exc.message)
            return _Ending(exc.kind, exc.message, 0.0)
        ready = time.monotonic()
        self._load_seconds = ready - began
        self.loaded = loaded
        self.state = "loaded"
        watchdog = self._watchdog = Watchdog(
            world_size=self.config.tensor_parallel_size,
            step_deadline_s=loaded.step_deadline_s,
            holds_work=lambda: bool(self._in_engine),
            ping=lambda nonce: _ping(process_group, nonce),
            ping_interval_s=self._ping_interval_s,
        )
        watching = asyncio.create_task(self._watch(process_group, watchdog))
        try:
            self._on_event(GroupLoaded(loaded))
            self._submit()
            reason = await asyncio.shield(process_group.ended)
        finally:
            watching.cancel()
            self._watchdog, self.stalled = None, None
        lived_s = time.monotonic() - ready
        if not self._is_stopping:
            self._on_death(reason, lived_s)
        return _Ending("died", reason, lived_s)

    async def _watch(self, process_group: ProcessGroup, watchdog: Watchdog) -> None:
        """End the process group when it is stuck or mute. What its threads were doing is in the log by then."""
        model_id = self.config.model_id
        while True:
            self.stalled = await watchdog.until_problem()
            logger.error("engine group seems stuck, its stacks follow model=%s reason=%s", model_id, self.stalled)
            process_group.dump_stacks()
            await asyncio.sleep(_STACKS_S)
            if watchdog.problem() is not None:
                process_group.end(self.stalled)
                return
            logger.warning("engine group was only slow model=%s reason=%s", model_id, self.stalled)
            self.stalled = None

    def _on_death(self, reason: str, lived_s: float) -> None:
        """What it held goes on in its successor, but for the one that killed it, if that is known."""
        self.state = "recovering"
        self._failures = self._policy.failures_after(self._failures, lived_s)
        cause = fault_attribution.book_death(self._in_engine.values(), was_stable=self._policy.is_stable(lived_s))
        for sequence in self._in_engine.values():
            sequence.generation.ended_engine = f"{self._name}-{self.num_restarts}"
            self._set_aside(sequence)
        self._in_engine.clear()
        if cause is not None:
            del self._waiting[cause.number]
            self._failures = 1  # this death is explained, and its reason is gone
        self._announce_death(reason)
        if cause is not None:
            logger.error("a request kills its engine and is given up model=%s reason=%s", self.config.model_id, reason)
            cause.generation.fail(engine_fault(self.config.model_id, cause.num_faults + 1, reason), failed=cause)

    def _announce_death(self, reason: str) -> None:
        """Say so, unless there is no next attempt: then the end of the group is all there is to say."""
        self._retry_in_s = self._policy.delay_before(self._failures)
        if self._retry_in_s is not None:
            self._on_event(GroupDied(reason, self._retry_in_s))

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        """A bug in the loop above must show as a failed model, not as one that hangs for ever."""
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("engine group broke model=%s", self.config.model_id, exc_info=error)
            self._give_up("internal", f"{type(error).__name__}: {error}")

    def _give_up(self, kind: str, reason: str) -> None:
        self.state = "failed"
        logger.error("engine group failed model=%s kind=%s reason=%s", self.config.model_id, kind, reason)
        self._on_event(GroupFailed(kind, reason))
        self.fail_requests(lambda each: engine_lost(reason, self.retry_after, ended_engine=each.ended_engine))

    def _on_progress(self, progress: EngineProgress) -> None:
        self._on_event(GroupLoading(progress))

    # ------------------------------------------------------------------ steps

    def _on_pong(self, rank: int, nonce: int) -> None:
        if self._watchdog is not None:
            self._watchdog.ponged(rank, nonce)

    def _on_step(self, step: StepOutput) -> None:
        self.stats = step.stats
        if self._watchdog is not None:
            self._watchdog.stepped(step.stats.step_deadline_s)
        in_engine = self._in_engine
        for update in step.updates:
            sequence = in_engine.get(update.request_id)
            if sequence is not None:
                self._dispatch(sequence, update)
        for failure in step.failures:
            sequence = in_engine.pop(failure.request_id, None)
            if sequence is not None:
                logger.warning(
                    "sequence failed model=%s kind=%s message=%s", self.config.model_id, failure.kind, failure.message
                )
                # What fitted once did so in a larger cache than this engine found memory for.
                has_shrunk = failure.kind == "too_long" and sequence.num_faults > 0
                error = (
                    engine_lost(failure.message, self.retry_after, ended_engine=sequence.generation.ended_engine)
                    if has_shrunk
                    else sequence_error(failure, sequence.generate.grammar)
                )
                sequence.generation.fail(error, failed=sequence)
        if self._waiting:
            self._release()

    def _dispatch(self, sequence: LiveSequence, update: SequenceUpdate) -> None:
        if update.finish is not None:
            del self._in_engine[update.request_id]
        sequence.generation.push(sequence, sequence.without_repetition(update))

    def _forget(self, sequence: LiveSequence) -> None:
        """A request was abandoned by its reader: the engine drops it before its next step."""
        if self._waiting.pop(sequence.number, None) is None and self._in_engine.pop(sequence.request_id, None) is None:
            return
        if sequence.request_id:
            self._cancel(sequence.request_id)
        if self._waiting:
            self._submit()

    def _cancel(self, request_id: int) -> None:
        with suppress(ChannelClosed):  # the engine is gone, and the sequence with it
            self._channel_now().send(Cancel(request_id))

    # ------------------------------------------------------------------ who is in the engine

    def _submit(self) -> None:
        """Hand the engine every sequence whose turn it is."""
        if self.state != "loaded":
            return
        had_work = bool(self._in_engine)
        is_empty = not (had_work or self.stats.running or self.stats.waiting)
        for sequence in fault_attribution.due(
            self._waiting.values(), self._in_engine.values(), is_engine_empty=is_empty
        ):
            request_id = self._next_request_id
            try:
                self._channel_now().send(sequence.submission(request_id))
            except ChannelClosed:
                return  # its successor gets them
            self._next_request_id += 1
            sequence.request_id = request_id
            self._in_engine[request_id] = sequence
            del self._waiting[sequence.number]
            if not had_work and self._watchdog is not None:
                self._watchdog.work_began()
                had_work = True

    def _release(self) -> None:
        """After a step while others wait: who has passed the place of the fault makes room for the next suspect."""
        if any(map(fault_attribution.is_suspect, self._waiting.values())):
            for sequence in list(self._in_engine.values()):
                if not fault_attribution.is_suspect(sequence):
                    del self._in_engine[sequence.request_id]
                    self._cancel(sequence.request_id)
                    self._set_aside(sequence)
        self._submit()

    def _set_aside(self, sequence: LiveSequence) -> None:
        sequence.request_id = 0
        self._waiting[sequence.number] = sequence

    def _channel_now(self) -> EngineChannel:
        if self.state != "loaded" or self._process_group is None:
            raise ChannelClosed
        return self._process_group.channel


def _ping(process_group: ProcessGroup, nonce: int) -> None:
    for channel in process_group.channels:
        with suppress(ChannelClosed):  # the end of the group, which is noticed elsewhere
            channel.send(Ping(nonce))

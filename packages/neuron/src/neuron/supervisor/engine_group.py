"""One loaded model's engine group: kept alive from the config it was loaded with, until it is stopped."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec
from cortex_core.errors import ApiError

from neuron.protocol import (
    Cancel,
    EngineConfig,
    EngineStats,
    Generate,
    Loaded,
    LoadProgress,
    SequenceUpdate,
    StepOutput,
)
from neuron.supervisor.channel import ChannelClosed, EngineChannel
from neuron.supervisor.errors import EngineLoadError, engine_restarting, engine_stopped, sequence_error
from neuron.supervisor.generation import Generation, LiveSequence
from neuron.supervisor.incarnation import Incarnation, LaunchSettings
from neuron.supervisor.restart_policy import RestartPolicy

logger = logging.getLogger(__name__)

GroupState = Literal["new", "loading", "loaded", "recovering", "failed", "stopped"]


class GroupLoading(msgspec.Struct, frozen=True):
    """The group is coming up, for the first time or again."""

    progress: LoadProgress


class GroupLoaded(msgspec.Struct, frozen=True):
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

    `start` returns at once; what happens is told to `on_event`. Requests that were in flight when a group died end
    with the retryable `engine_restarting`; until the successor is up, `generate` raises the same.
    """

    def __init__(
        self,
        config: EngineConfig,
        settings: LaunchSettings,
        *,
        on_event: Callable[[GroupEvent], None],
        policy: RestartPolicy | None = None,
    ) -> None:
        self.config = config
        self.state: GroupState = "new"
        self.loaded: Loaded | None = None
        self.stats = EngineStats()
        self.num_restarts = 0
        self._settings = settings
        self._on_event = on_event
        self._policy = policy or RestartPolicy()
        self._incarnation: Incarnation | None = None
        self._live: dict[int, LiveSequence] = {}
        self._next_request_id = 1
        self._task: asyncio.Task[None] | None = None
        self._failures = 0
        self._is_stopping = False
        self._load_seconds = 0.0
        self._retry_in_s = 0.0

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
        self.fail_requests(engine_stopped)
        incarnation = self._incarnation
        if was_loaded and incarnation is not None:
            await incarnation.stop()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks that were started last."""
        return [] if self._incarnation is None else self._incarnation.pids

    @property
    def num_live(self) -> int:
        """Sequences in flight."""
        return len(self._live)

    # ------------------------------------------------------------------ requests

    async def generate(self, requests: Sequence[Generate], *, heartbeat_s: float | None = None) -> Generation:
        """Start the sequences of one request, one per choice in order; their `request_id`s are assigned here.

        Raises `ApiError` (`engine_restarting`) while there is no engine.
        """
        generation = Generation(self._forget, heartbeat_s=heartbeat_s)
        try:
            await self._channel_now().writable()
            channel = self._channel_now()
            for choice, request in enumerate(requests):
                numbered = msgspec.structs.replace(request, request_id=self._next_request_id)
                self._next_request_id += 1
                sequence = LiveSequence(choice, numbered, generation)
                channel.send(numbered)
                self._live[numbered.request_id] = sequence
                generation.add(sequence)
        except ChannelClosed:
            generation.cancel()
            raise engine_restarting(self.retry_after) from None
        return generation

    @property
    def retry_after(self) -> int:
        """Seconds until a retry makes sense, while the group is down: the pause, and a load like the last one."""
        return self._policy.retry_after(self._retry_in_s, self._load_seconds)

    def fail_requests(self, error: Callable[[], ApiError]) -> None:
        """End every request in flight with an error of its own, as when the daemon's time to drain is over."""
        for generation in {id(sequence.generation): sequence.generation for sequence in self._live.values()}.values():
            generation.fail(error())

    # ------------------------------------------------------------------ the loop of its life

    async def _run(self) -> None:
        while True:
            config = msgspec.structs.replace(self.config, epoch=self.num_restarts)
            incarnation = Incarnation(config, self._settings, on_progress=self._on_progress, on_step=self._on_step)
            self._incarnation = incarnation
            try:
                ending = await self._live_through(incarnation)
            finally:
                await incarnation.kill()
            if self._is_stopping:
                return
            if self.loaded is None:
                self._give_up(ending.kind, ending.reason)
                return
            logger.error(
                "engine group died model=%s epoch=%d lived_s=%.1f failures=%d reason=%s exit=%s",
                config.model_id,
                config.epoch,
                ending.lived_s,
                self._failures,
                ending.reason,
                incarnation.describe_exits(),
            )
            delay_s = self._policy.delay_before(self._failures)
            if delay_s is None:
                self._give_up(ending.kind, f"{ending.reason} ({self._failures} failures in a row)")
                return
            self.num_restarts += 1
            self.stats = EngineStats()
            await asyncio.sleep(delay_s)

    async def _live_through(self, incarnation: Incarnation) -> _Ending:
        """From spawn to the end, whatever it is. Its requests have been told when this returns."""
        began = time.monotonic()
        try:
            loaded = await incarnation.load()
        except EngineLoadError as exc:
            self._book_failure(exc.message, 0.0)
            return _Ending(exc.kind, exc.message, 0.0)
        ready = time.monotonic()
        self._load_seconds = ready - began
        self.loaded = loaded
        self.state = "loaded"
        self._on_event(GroupLoaded(loaded))
        reason = await asyncio.shield(incarnation.ended)
        lived_s = time.monotonic() - ready
        if not self._is_stopping:
            self.state = "recovering"
            self._book_failure(reason, lived_s)
            retry_after = self.retry_after
            self.fail_requests(lambda: engine_restarting(retry_after))
        return _Ending("died", reason, lived_s)

    def _book_failure(self, reason: str, lived_s: float) -> None:
        """Count it, and say so before anyone who was served by it can ask again."""
        self._failures = self._policy.failures_after(self._failures, lived_s)
        delay_s = self._policy.delay_before(self._failures)
        self._retry_in_s = delay_s or 0.0
        if self.loaded is not None and delay_s is not None:
            self._on_event(GroupDied(reason, delay_s))

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        """A bug in the loop above must show as a failed model, not as one that hangs for ever."""
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("engine group broke model=%s", self.config.model_id, exc_info=error)
            self.fail_requests(engine_stopped)
            self._give_up("internal", f"{type(error).__name__}: {error}")

    def _give_up(self, kind: str, reason: str) -> None:
        self.state = "failed"
        logger.error("engine group failed model=%s kind=%s reason=%s", self.config.model_id, kind, reason)
        self._on_event(GroupFailed(kind, reason))

    def _on_progress(self, progress: LoadProgress) -> None:
        self._on_event(GroupLoading(progress))

    # ------------------------------------------------------------------ steps

    def _on_step(self, step: StepOutput) -> None:
        self.stats = step.stats
        live = self._live
        for update in step.updates:
            sequence = live.get(update.request_id)
            if sequence is not None:
                self._dispatch(sequence, update)
        for failure in step.failures:
            sequence = live.pop(failure.request_id, None)
            if sequence is not None:
                logger.warning(
                    "sequence failed model=%s kind=%s message=%s", self.config.model_id, failure.kind, failure.message
                )
                sequence.generation.fail(sequence_error(failure), failed=sequence)

    def _dispatch(self, sequence: LiveSequence, update: SequenceUpdate) -> None:
        if update.finish is not None:
            del self._live[update.request_id]
        sequence.generation.push(sequence, update)

    def _forget(self, sequence: LiveSequence) -> None:
        """A request was abandoned by its reader: the engine drops it before its next step."""
        if self._live.pop(sequence.generate.request_id, None) is None:
            return
        try:
            self._channel_now().send(Cancel(sequence.generate.request_id))
        except ChannelClosed:
            return  # the engine is gone, and the sequence with it

    def _channel_now(self) -> EngineChannel:
        if self.state != "loaded" or self._incarnation is None:
            raise ChannelClosed
        return self._incarnation.channel

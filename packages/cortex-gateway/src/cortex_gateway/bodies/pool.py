"""The processes that read large bodies, from the gateway's side: whose turn it is, and what became of each."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from cortex_core.errors import ApiError
from cortex_core.serving.turns import Turns

from cortex_gateway.bodies.messages import Job, Order, Refused, Result, Translate
from cortex_gateway.bodies.process import MEMORY_BYTES, BodyProcess, Lost, ProcessLost

logger = logging.getLogger(__name__)

MAX_PROCESSES = 2
MAX_LONG = 1
"""Translations at once: bodies that only pass are not kept waiting by them."""
MAX_WAIT_S = 60.0
"""Until it is a body's turn."""
IDLE_S = 60.0
"""After which a process that has nothing to do is ended."""
MAX_ATTEMPTS = 2
CPU_S = 2.0
CPU_S_PER_MB = 0.5
"""A body that passes takes some hundredths of a second; one that is translated up to a third for each MB."""
WALL_FLOOR_S = 10.0
WALL_FACTOR = 5.0


def cpu_budget_s(num_bytes: int) -> float:
    return CPU_S + CPU_S_PER_MB * num_bytes / 1e6


def wall_budget_s(cpu_s: float) -> float:
    return WALL_FLOOR_S + WALL_FACTOR * cpu_s


class _Waiting:
    """A job, and the future that says that its turn has come."""

    __slots__ = ("is_long", "principal", "turn")

    def __init__(self, principal: str | None, is_long: bool) -> None:
        self.principal = principal
        self.is_long = is_long
        self.turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class BodyWorkers:
    """Processes are started when there is something to do, and ended when there is not. on_end: told why each ended
    that did so under a body."""

    def __init__(self, on_end: Callable[[Lost], None] = lambda reason: None) -> None:
        self._on_end = on_end
        self._turns: Turns[_Waiting] = Turns()
        self._processes: set[BodyProcess] = set()
        self._idle: list[BodyProcess] = []
        self._num_running = 0
        self._num_long = 0
        self._trim: asyncio.TimerHandle | None = None
        self._ending: set[asyncio.Task[None]] = set()
        self._is_closed = False

    @property
    def pids(self) -> list[int]:
        """Of the processes that there are."""
        return [process.pid for process in self._processes]

    async def close(self) -> None:
        self._is_closed = True
        if self._trim is not None:
            self._trim.cancel()
        for waiting in self._turns.drain():
            if not waiting.turn.done():
                waiting.turn.set_exception(_closed())
        self._idle.clear()
        processes, self._processes = self._processes, set()
        await asyncio.gather(*(process.stop() for process in processes), *self._ending)

    async def run(
        self, job: Job, pieces: Iterable[bytes], *, num_bytes: int, principal: str | None
    ) -> tuple[Result, list[bytes]]:
        """What came of `job` on this body, and the pieces of the body that goes with it.

        Principals take turns. Raises `ApiError`: what is wrong with the body; 413 `body_budget_exceeded` where reading
        it took more processor time or memory than it may; 503 `body_queue_timeout`. Cancelled, the job ends too.
        """
        if self._is_closed:
            raise _closed()
        pieces = list(pieces)
        waiting = _Waiting(principal, isinstance(job, Translate))
        await self._take_turn(waiting)
        try:
            for attempt in range(1, MAX_ATTEMPTS + 1):
                try:
                    result, found = await self._run_once(job, pieces, num_bytes)
                    break
                except ProcessLost as lost:
                    self._on_end(lost.reason)
                    logger.warning(
                        "body worker ended reason=%s job=%s bytes=%d principal=%s",
                        lost.reason,
                        type(job).__name__.lower(),
                        num_bytes,
                        principal or "-",
                    )
                    if lost.reason != "died":
                        raise over_budget(lost.reason, num_bytes) from None
                    if attempt == MAX_ATTEMPTS:
                        message = "The body could not be read: it ends the process that does."
                        raise ApiError("internal", message, code="body_worker_died") from None
        finally:
            self._end_turn(waiting)
        if isinstance(result, Refused):
            if result.is_out_of_memory:
                self._on_end("memory")
                raise over_budget("memory", num_bytes)
            raise result.error()
        return result, found

    async def _run_once(self, job: Job, pieces: list[bytes], num_bytes: int) -> tuple[Result, list[bytes]]:
        process = self._idle.pop() if self._idle else await self._start()
        cpu_s = cpu_budget_s(num_bytes)
        try:
            return await process.run(Order(cpu_s, job), pieces, wall_s=wall_budget_s(cpu_s))
        finally:
            if process.is_over:
                self._end(process)
            else:
                self._idle.append(process)
                self._trim_later()

    async def _start(self) -> BodyProcess:
        try:
            process = await BodyProcess.start()
            self._processes.add(process)
            return process
        except OSError as exc:
            logger.error("no process can be started to read a large body: %s", exc)
            raise ApiError(
                "overloaded", "Large bodies cannot be read now.", code="body_workers_unavailable", retry_after=5
            ) from None

    # ------------------------------------------------------------------------------------------ turns

    async def _take_turn(self, waiting: _Waiting) -> None:
        self._turns.put(waiting, waiting.principal, is_long=waiting.is_long)
        self._dispatch()
        try:
            async with asyncio.timeout(MAX_WAIT_S):
                await waiting.turn
        except TimeoutError:
            self._leave(waiting)
            raise ApiError(
                "overloaded",
                f"It was not this body's turn to be read within {MAX_WAIT_S:g} s.",
                code="body_queue_timeout",
                retry_after=5,
            ) from None
        except asyncio.CancelledError:
            self._leave(waiting)
            raise

    def _leave(self, waiting: _Waiting) -> None:
        """It does not wait any more; its turn, if it has just come, is the next one's."""
        is_waiting = self._turns.remove(waiting, waiting.principal, is_long=waiting.is_long)
        if not is_waiting and waiting.turn.done() and not waiting.turn.cancelled() and not waiting.turn.exception():
            self._end_turn(waiting)

    def _end_turn(self, waiting: _Waiting) -> None:
        self._num_running -= 1
        self._num_long -= waiting.is_long
        self._dispatch()

    def _dispatch(self) -> None:
        while self._num_running < MAX_PROCESSES:
            waiting = self._turns.next(takes_long=self._num_long < MAX_LONG)
            if waiting is None:
                return
            if waiting.turn.done():
                continue
            self._num_running += 1
            self._num_long += waiting.is_long
            waiting.turn.set_result(None)

    # ------------------------------------------------------------------------------------------ processes

    def _trim_later(self) -> None:
        if self._trim is None and not self._is_closed:
            self._trim = asyncio.get_running_loop().call_later(IDLE_S, self._trim_now)

    def _trim_now(self) -> None:
        self._trim = None
        idle, self._idle = self._idle, []
        for process in idle:
            self._end(process)

    def _end(self, process: BodyProcess) -> None:
        self._processes.discard(process)
        task = asyncio.create_task(process.stop())
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)


def over_budget(reason: Lost, num_bytes: int) -> ApiError:
    cpu_s = cpu_budget_s(num_bytes)
    limit = {"cpu": f"{cpu_s:.1f} s of processor time", "memory": f"{MEMORY_BYTES // 2**20} MiB of memory"}.get(
        reason, f"{wall_budget_s(cpu_s):.0f} s"
    )
    return ApiError(
        "request_too_large",
        f"Reading this body of {num_bytes} bytes took more than {limit}, which is the limit for its size.",
        code="body_budget_exceeded",
        extras={"limit": limit, "bytes": num_bytes},
    )


def _closed() -> ApiError:
    return ApiError("overloaded", "The gateway is shutting down; ask again.", code="shutting_down", retry_after=5)

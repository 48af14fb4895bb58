"""The workers of one model, from the daemon's side: who waits, who works, who ran out of budget."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable

from cortex_core.errors import ApiError
from cortex_core.serving.turns import Turns

from neuron.daemon.text_workers.host_process import HostProcess, TextLoadError
from neuron.daemon.text_workers.limits import cpu_budget_s, wall_budget_s
from neuron.daemon.text_workers.messages import Done, Job, Refused, Result, Stage, TextInfo, Work, WorkerEnded
from neuron.daemon.text_workers.settings import TextSettings
from neuron.daemon.text_workers.worker_handle import LostReason, WorkerHandle

logger = logging.getLogger(__name__)

LONG_JOB_BYTES = 8_192
"""From here on a job is a long one."""
MAX_WAITING_BYTES = 256 * 2**20
MAX_WAITING_JOBS = 4_096
IDLE_WORKERS = 1
"""As many stay when nothing is to be done; one more each `IDLE_S` seconds is given up."""
IDLE_S = 30.0
MAX_WAIT_S = 60.0
"""A job that no worker has taken by then is refused."""
YIELD_AFTER_S = 0.5
ABANDONED_S = 0.1
MAX_ATTEMPTS = 2
MAX_STARTS = 5
"""How many workers a job may be given to where they end before they have read it."""
HOST_RETRY_S = (0.0, 1.0, 5.0, 30.0)


class _Waiting:
    """A job and who waits for it."""

    __slots__ = ("attempts", "body", "expiry", "future", "is_long", "num_bytes", "principal", "work")

    def __init__(self, work: Work, body: bytes, principal: str | None, future: asyncio.Future[Result]) -> None:
        self.work = work
        self.body = body
        self.num_bytes = len(body)
        self.principal = principal
        self.is_long = self.num_bytes >= LONG_JOB_BYTES
        self.future = future
        self.attempts = 0
        self.expiry: asyncio.TimerHandle | None = None

    def refuse(self, error: ApiError) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class TextPool:
    """`open`, then `run` as often as wanted, then `close`. on_end: told why each worker ended that had to."""

    def __init__(
        self,
        path: str,
        settings: TextSettings,
        *,
        label: str,
        on_end: Callable[[LostReason], None] = lambda reason: None,
    ) -> None:
        self._path = path
        self._settings = settings
        self._label = label
        self._on_end = on_end
        self._turns: Turns[_Waiting] = Turns()
        self._waiting_bytes = 0
        self._workers: dict[int, WorkerHandle] = {}
        self._jobs: dict[int, _Waiting] = {}
        self._numbers = itertools.count()
        self._host: HostProcess | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closed = False
        self._trim: asyncio.TimerHandle | None = None
        self.unavailable: str | None = None
        """Why no worker can be had, None while they can."""
        self._is_down = False

    @property
    def num_workers(self) -> int:
        return len(self._workers)

    @property
    def num_waiting(self) -> int:
        return len(self._turns)

    @property
    def pids(self) -> list[int]:
        """Of the host and of the workers that have said hello."""
        host = [] if self._host is None else [self._host.pid]
        return host + [worker.pid for worker in self._workers.values() if worker.pid]

    # ------------------------------------------------------------------ life

    async def open(self) -> TextInfo:
        """Start the host and have it read the checkpoint's text files. Raises `TextLoadError`."""
        info = await self._start_host()
        self._fork()
        return info

    async def close(self) -> None:
        """Kill everything; who waits is refused."""
        self._is_closed = True
        for task in list(self._tasks):
            task.cancel()
        if self._trim is not None:
            self._trim.cancel()
        gone = ApiError("overloaded", "The model is being unloaded.", code="model_unloading", retry_after=5)
        for job in [*self._turns.drain(), *self._jobs.values()]:
            job.refuse(gone)
        for worker in list(self._workers.values()):
            worker.close()
        self._workers.clear()
        self._jobs.clear()
        if self._host is not None:
            await self._host.stop()

    async def _start_host(self) -> TextInfo:
        host = self._host = HostProcess(
            self._path, self._settings, label=self._label, on_worker_ended=self._worker_ended, on_lost=self._host_lost
        )
        try:
            return await host.start()
        except BaseException:
            await host.stop()
            raise

    def _host_lost(self, host: HostProcess) -> None:
        """The host is gone and its workers with it: start another, and give what they worked on to those."""
        if self._is_closed or host is not self._host:
            return
        logger.error("text host ended unexpectedly model=%s", self._label)
        self.unavailable = "the process that prepares prompts is being restarted"
        for number in list(self._workers):
            self._worker_lost(number, "died", "body")
        task = asyncio.create_task(self._restart())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _restart(self) -> None:
        for attempt in itertools.count():
            await asyncio.sleep(HOST_RETRY_S[min(attempt, len(HOST_RETRY_S) - 1)])
            try:
                await self._start_host()
            except TextLoadError as exc:
                self.unavailable = f"the process that prepares prompts cannot be restarted: {exc}"
                logger.error("text host not restarted model=%s reason=%s", self._label, exc)
                self._is_down = True
                for job in self._turns.drain():
                    self._waiting_bytes -= job.num_bytes
                    job.refuse(self._unavailable_error())
                continue
            break
        self.unavailable, self._is_down = None, False
        self._dispatch()

    def _unavailable_error(self) -> ApiError:
        return ApiError(
            "overloaded",
            f"The model `{self._label}` cannot take requests now: {self.unavailable}.",
            code="text_unavailable",
            retry_after=5,
        )

    # ------------------------------------------------------------------ work

    async def run(self, work: Work, body: bytes, *, principal: str | None) -> Result:
        """What became of `work` on the body of a request.

        Raises `ApiError`: what the job itself raised, `text_budget_exceeded` where it took more processor time or
        memory than it may, `text_queue_full`. Cancelled, the job ends too.
        """
        if self._is_closed:
            raise ApiError("overloaded", "The model is being unloaded.", code="model_unloading", retry_after=5)
        if self._is_down:
            raise self._unavailable_error()
        if len(self._turns) >= MAX_WAITING_JOBS or self._waiting_bytes + len(body) > MAX_WAITING_BYTES:
            raise ApiError(
                "overloaded",
                f"{len(self._turns)} requests of {self._waiting_bytes} bytes wait to be prepared for "
                f"`{self._label}`; at most {MAX_WAITING_JOBS} with {MAX_WAITING_BYTES} bytes may.",
                code="text_queue_full",
                retry_after=2,
            )
        job = _Waiting(work, body, principal, asyncio.get_running_loop().create_future())
        self._put(job)
        self._dispatch()
        try:
            result = await job.future
        except asyncio.CancelledError:
            self._abandon(job)
            raise
        if isinstance(result, Refused):
            raise result.error()
        return result

    def _put(self, job: _Waiting) -> None:
        self._turns.put(job, job.principal, is_long=job.is_long)
        self._waiting_bytes += job.num_bytes
        job.expiry = asyncio.get_running_loop().call_later(MAX_WAIT_S, self._expire, job)

    def _take(self) -> _Waiting | None:
        """The job whose turn it is."""
        job = self._turns.next(takes_long=self._may_take_long())
        if job is not None:
            self._no_longer_waits(job)
        return job

    def _no_longer_waits(self, job: _Waiting) -> None:
        self._waiting_bytes -= job.num_bytes
        if job.expiry is not None:
            job.expiry.cancel()

    def _expire(self, job: _Waiting) -> None:
        if self._turns.remove(job, job.principal, is_long=job.is_long):
            self._no_longer_waits(job)
            job.refuse(
                ApiError(
                    "overloaded",
                    f"No process was free to prepare this request for {MAX_WAIT_S:.0f} s.",
                    code="text_queue_timeout",
                    retry_after=5,
                )
            )

    def _dispatch(self) -> None:
        """Give waiting jobs to idle workers, and fork more where there are none."""
        if self._is_closed:
            return
        for worker in self._workers.values():
            if not len(self._turns):
                return
            if worker.is_ready and worker.number not in self._jobs:
                job = self._take()
                if job is None:
                    break
                self._give(worker, job)
        starting = sum(not worker.is_ready for worker in self._workers.values())
        wanted = min(len(self._turns) - starting, self._settings.max_workers - len(self._workers))
        if self.unavailable is None:
            for _ in range(wanted):
                self._fork()

    def _may_take_long(self) -> bool:
        num_long = sum(job.is_long for job in self._jobs.values())
        return num_long < max(1, self._settings.max_workers - 1)

    def _give(self, worker: WorkerHandle, job: _Waiting) -> None:
        job.attempts += 1
        self._jobs[worker.number] = job
        cpu_s = cpu_budget_s(self._settings.cpu_s, job.num_bytes)
        worker.give(
            Job(cpu_s, job.work, job.num_bytes), job.body, yield_after_s=YIELD_AFTER_S, wall_s=wall_budget_s(cpu_s)
        )

    def _abandon(self, job: _Waiting) -> None:
        """Nobody waits for it any more."""
        if self._turns.remove(job, job.principal, is_long=job.is_long):
            self._no_longer_waits(job)
            return
        for number, running in self._jobs.items():
            if running is job:
                self._workers[number].end_soon(ABANDONED_S)

    # ------------------------------------------------------------------ workers

    def _fork(self) -> None:
        host = self._host
        if host is None:
            return
        number = next(self._numbers)
        worker = WorkerHandle(
            number,
            host,
            on_ready=self._worker_ready,
            on_done=self._worker_answered,
            on_lost=self._worker_gone,
        )
        self._workers[number] = worker
        worker.start()

    def _worker_ready(self, number: int) -> None:
        self._dispatch()

    def _worker_answered(self, number: int, done: Done) -> None:
        job = self._jobs.pop(number, None)
        if done.is_last:
            self._workers.pop(number).close()
        if job is not None:
            if isinstance(done.result, Refused) and done.result.is_out_of_memory:
                self._on_end("memory")
                self._log_end(job, "memory", done.stage)
                job.refuse(self._over_budget(job, "memory", done.stage))
            elif not job.future.done():
                job.future.set_result(done.result)
        self._dispatch()
        self._trim_later()

    def _worker_ended(self, ended: WorkerEnded) -> None:
        """The host says how a worker ended; its connection may say so before or after."""
        for worker in self._workers.values():
            if worker.pid == ended.pid:
                worker.ended(ended)
                return

    def _worker_gone(self, number: int, reason: LostReason, stage: Stage) -> None:
        if not self._is_closed:
            self._worker_lost(number, reason, stage)
            self._dispatch()

    def _worker_lost(self, number: int, reason: LostReason, stage: Stage) -> None:
        worker = self._workers.pop(number, None)
        if worker is None:
            return
        worker.close()
        job = self._jobs.pop(number, None)
        if job is None:
            return
        if reason == "died" and stage == "start" and job.attempts < MAX_STARTS:
            if not job.future.done():
                self._put(job)  # the worker was gone before it had read the job
            return
        self._on_end(reason)
        self._log_end(job, reason, stage)
        if reason != "died":
            job.refuse(self._over_budget(job, reason, stage))
        elif job.future.done():
            return
        elif job.attempts < MAX_ATTEMPTS:
            self._put(job)  # it may have been somebody else's doing: the kernel's, an operator's
        else:
            job.refuse(
                ApiError("internal", "The request could not be prepared: it ends its process.", code="text_worker_died")
            )

    def _log_end(self, job: _Waiting, reason: LostReason, stage: Stage) -> None:
        logger.warning(
            "text worker ended model=%s reason=%s stage=%s bytes=%d principal=%s",
            self._label,
            reason,
            stage,
            job.num_bytes,
            job.principal or "-",
        )

    def _over_budget(self, job: _Waiting, reason: LostReason, stage: Stage) -> ApiError:
        cpu_s = cpu_budget_s(self._settings.cpu_s, job.num_bytes)
        limit = {
            "cpu": f"{cpu_s:.1f} s of processor time",
            "memory": f"{self._settings.memory_bytes // 2**20} MiB of memory",
        }.get(reason, f"{wall_budget_s(cpu_s):.0f} s")
        what = {
            "messages": "rendering and tokenising `messages`",
            "prompt": "tokenising `prompt`",
            "grammar": "compiling the requested form of the output",
        }.get(stage, "reading the request")
        return ApiError(
            "invalid_request",
            f"This request is not served: {what} took more than {limit}, which is the limit for {job.num_bytes} bytes.",
            code="text_budget_exceeded",
            param={"messages": "messages", "prompt": "prompt", "grammar": "response_format"}.get(stage),
            extras={"limit": limit, "bytes": job.num_bytes},
        )

    def _trim_later(self) -> None:
        if self._trim is None and len(self._workers) > IDLE_WORKERS:
            self._trim = asyncio.get_running_loop().call_later(IDLE_S, self._trim_now)

    def _trim_now(self) -> None:
        self._trim = None
        idle = [worker for worker in self._workers.values() if worker.is_ready and worker.number not in self._jobs]
        if len(self._workers) > IDLE_WORKERS and idle and not len(self._turns):
            worker = self._workers.pop(idle[-1].number)
            worker.close()  # it ends when its connection does
        self._trim_later()

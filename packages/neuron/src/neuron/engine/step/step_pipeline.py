"""Steps one after the other, the next one launched while the device computes the last (overlap of one step).

```
host     plan N+1 | launch N+1 | wait N | book N, frame | plan N+2 | launch N+2 | wait N+1 | …
device   ─ step N ─────────────────────┤─ step N+1 ──────────────────────────────────────┤─ step N+2 …
```

A step on top of another takes over its tokens on the device. Where penalties or a grammar need them on the host, the
step's forward pass is launched and its sampling waits until they are booked, which is while that pass runs.

With depth 0 a step is booked before the next is planned, and nothing of this matters. With depth 1 results are the
same token for token: what a row of a step computes depends on its sequence alone, and what was computed for a sequence
that has ended is thrown away. Whatever fails brings the pipeline to a halt first: what is under way is booked or
rolled back, and then the failed step is repeated in smaller parts with nothing else in flight.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from neuron.engine.errors import (
    DeviceError,
    ShortOfMemory,
    StepError,
    describe,
    is_device_fault,
    is_out_of_memory,
)
from neuron.engine.sampling.sampler import Sampled
from neuron.engine.scheduler.scheduler import Chunk, Scheduler, StepInFlight, StepPlan
from neuron.engine.step.runner import ChunkResult, InFlightStep, ModelRunner


@dataclass(frozen=True, slots=True)
class _Failure:
    """Of a step, while the device is fine."""

    is_memory: bool
    reason: str


def _failure(error: Exception) -> _Failure:
    """Raises `DeviceError` where the device is lost."""
    if is_device_fault(error):
        raise DeviceError("device", describe(error)) from error
    return _Failure(is_out_of_memory(error), describe(error))


class StepPipeline:
    """Takes plans from the scheduler, has the runner compute them, and hands results over in order.

    depth: steps that may be under way when `advance` returns, 0 or 1. book(plan, results, seconds): called once for
    each step, in order; seconds that the device was seen to need. on_shortage(plan): a step found no memory.
    """

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: Scheduler,
        *,
        depth: int,
        page_size: int,
        book: Callable[[StepPlan, list[ChunkResult], float], None],
        on_shortage: Callable[[StepPlan], None],
    ) -> None:
        if depth not in (0, 1):
            raise ValueError(f"a depth of {depth}: tokens are taken over from one step only")
        self._runner = runner
        self._scheduler = scheduler
        self._depth = depth
        self._page_size = page_size
        self._book = book
        self._on_shortage = on_shortage
        self._in_flight: deque[InFlightStep] = deque()
        self._last_done = 0.0
        self.has_released = False  # pages of those that left came back since this was last set to False

    @property
    def is_empty(self) -> bool:
        """True if no step is under way."""
        return not self._in_flight

    def advance(self) -> bool:
        """Launch what the depth allows and book the oldest step. False if there was neither.

        Raises `DeviceError` when the device is lost; every other failure ends up in the results of its chunks.
        """
        in_flight = self._in_flight
        while True:
            plan = self._plan()
            if plan is not None:
                booked = self._launch(plan)
                if booked:
                    return True
            if in_flight and (plan is None or len(in_flight) > self._depth):
                self._land()
                return True
            if plan is None:
                return False

    def drain(self) -> None:
        """Book everything that is under way."""
        while self._in_flight:
            self._land()

    def _plan(self) -> StepPlan | None:
        try:
            return self._scheduler.schedule()
        except StepInFlight:
            self.drain()
            return self._scheduler.schedule()

    def _launch(self, plan: StepPlan) -> bool:
        """True if the step is booked already, because it could not be launched as it is."""
        started = time.perf_counter()
        if not self._depth:
            # Nothing is planned between launching and booking: the scheduler need not know.
            self._book(plan, self._attempt(plan), time.perf_counter() - started)
            return True
        try:
            in_flight = self._runner.launch(plan)
        except Exception as exc:
            failure = _failure(exc)
        else:
            in_flight.started = started
            self._in_flight.append(in_flight)
            self._scheduler.launched(plan)
            return False
        # Outside of the handler: the traceback kept the failed step's tensors alive.
        self.drain()
        self._repeat(plan, failure)
        return True

    def _land(self) -> None:
        """Book the oldest step; then the one on top of it can be sampled where that waited for this step's tokens."""
        in_flight = self._in_flight.popleft()
        plan = in_flight.plan
        failure = None
        try:
            results = self._runner.collect(in_flight)
        except Exception as exc:
            failure = _failure(exc)
        if failure is not None:
            self._roll_back(in_flight)
            self._repeat(plan, failure)
            return
        now = time.perf_counter()
        seconds, self._last_done = now - max(in_flight.started, self._last_done), now
        self._scheduler.step_done(plan)
        self._book(plan, results, seconds)
        self._release()
        if self._in_flight and not self._in_flight[-1].is_sampled:
            self._sample(self._in_flight[-1])

    def _sample(self, in_flight: InFlightStep) -> None:
        try:
            self._runner.sample(in_flight)
            return
        except Exception as exc:
            failure = _failure(exc)
        self._in_flight.remove(in_flight)
        self._roll_back(in_flight)
        self._repeat(in_flight.plan, failure)

    def _roll_back(self, failed: InFlightStep) -> None:
        """Forget a step and those on top of it, which have its tokens as inputs; the device is done with them then."""
        rolled_back = [failed, *self._in_flight]
        self._in_flight.clear()
        for in_flight in reversed(rolled_back):
            self._runner.abandon(in_flight)
            self._scheduler.roll_back(in_flight.plan)

    def _repeat(self, plan: StepPlan, failure: _Failure) -> None:
        """What is left to do of a failed step, with nothing else under way."""
        plan = plan.remaining()
        started = time.perf_counter()
        results = self._retry(plan, failure) if plan.chunks else []
        self._last_done = time.perf_counter()
        self._book(plan, results, self._last_done - started)
        self._release()

    def _release(self) -> None:
        if self._scheduler.release():
            self.has_released = True

    def _attempt(self, plan: StepPlan) -> list[ChunkResult]:
        """Execute; after a failure again in halves, so that in the end only the chunks that fail alone are lost.

        Where memory is short, it is freed, prefill becomes shorter, and what does not fit alone comes again later.
        """
        try:
            return self._runner.execute(plan)
        except Exception as exc:
            failure = _failure(exc)
        # Outside of the handler: the traceback kept the failed step's tensors alive.
        return self._retry(plan, failure)

    def _retry(self, plan: StepPlan, failure: _Failure) -> list[ChunkResult]:
        if failure.is_memory:
            self._runner.free_memory()
            self._on_shortage(plan)
        chunks = plan.chunks
        if len(chunks) > 1:
            middle = len(chunks) // 2
            return self._attempt(plan.only(chunks[:middle])) + self._attempt(plan.only(chunks[middle:]))
        chunk = chunks[0]
        if failure.is_memory and chunk.num_tokens > self._page_size:
            shorter = Chunk(chunk.sequence, chunk.start, max(self._page_size, chunk.num_tokens // 2), 0)
            return self._attempt(plan.only([shorter]))
        error = ShortOfMemory if failure.is_memory else StepError
        return [ChunkResult(chunk, [Sampled(-1, error=error("step", failure.reason))])]

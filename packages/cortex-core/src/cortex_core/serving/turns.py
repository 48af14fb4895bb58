"""Fair queue of jobs: principals take turns, and long jobs never take the last worker. Pure.

Within a principal short jobs go before long ones, each kind in its order. Among principals the one that was served
longest ago goes first, so that a thousand jobs of one cost another no more than one turn.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """Jobs that wait. principal: None is one of its own, of all who give no name."""

    def __init__(self) -> None:
        self._short: OrderedDict[str | None, deque[T]] = OrderedDict()
        self._long: OrderedDict[str | None, deque[T]] = OrderedDict()
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def put(self, job: T, principal: str | None, *, is_long: bool) -> None:
        (self._long if is_long else self._short).setdefault(principal, deque()).append(job)
        self._num_waiting += 1

    def next(self, *, takes_long: bool) -> T | None:
        """The job whose turn it is, None where nobody waits. takes_long: whether it may be a long one."""
        job = self._next_of(self._short)
        return self._next_of(self._long) if job is None and takes_long else job

    def remove(self, job: T, principal: str | None, *, is_long: bool) -> bool:
        """Whether it was still waiting."""
        queues = self._long if is_long else self._short
        queue = queues.get(principal)
        if queue is None or job not in queue:
            return False
        queue.remove(job)
        self._num_waiting -= 1
        if not queue:
            del queues[principal]
        return True

    def drain(self) -> list[T]:
        """All that wait; afterwards nobody does."""
        jobs = [job for queues in (self._short, self._long) for queue in queues.values() for job in queue]
        self._short.clear()
        self._long.clear()
        self._num_waiting = 0
        return jobs

    def _next_of(self, queues: OrderedDict[str | None, deque[T]]) -> T | None:
        if not queues:
            return None
        principal, queue = queues.popitem(last=False)
        job = queue.popleft()
        self._num_waiting -= 1
        if queue:
            queues[principal] = queue  # at the end: it has had its turn
        return job

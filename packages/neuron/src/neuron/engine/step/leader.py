"""Rank 0's side of a group: what the other ranks are told before each step, and whether a step may be launched."""

from __future__ import annotations

from collections.abc import Callable

from neuron.engine.parallel.messages import (
    Capacity,
    Capture,
    Captured,
    FreeMemory,
    GraphKey,
    LeaderLink,
    PackedBatch,
    Proceed,
    RunStep,
    ZeroPages,
)


class StepTooLarge(MemoryError):
    """A rank has no memory for a step, which no rank has begun: to be tried again in smaller parts."""


class StepLeader:
    """Sends each step to the followers, and asks first where it is not sure that all have the memory for it.

    A step no larger than those that have succeeded is known to fit, because nothing that a rank allocates outlives a
    step; so in the ordinary course nobody is asked and nothing is waited for. After a shortage anywhere that knowledge
    is void, and each step larger than those since is agreed on before its first collective.
    """

    def __init__(self, link: LeaderLink) -> None:
        self._link = link
        self._proven_tokens = 0
        self._proven_rows = 0

    def launch(
        self,
        plan: int,
        batch: PackedBatch,
        logits_slices: list[tuple[int, int]],
        max_tokens_here: Callable[[int, int], int],
        *,
        graph: GraphKey | None = None,
    ) -> None:
        """From here on the followers compute the step, and rank 0 must.

        max_tokens_here(tokens, rows of logits): the largest step that rank 0's memory holds. graph: what all replay;
        such a step needs no memory that is not there already. Raises `StepTooLarge`,
        and then nobody computes it; `DeviceError` when a follower is lost.
        """
        link = self._link
        is_probe = graph is None and (batch.num_tokens > self._proven_tokens or batch.num_logits > self._proven_rows)
        link.send(RunStep(link.epoch, link.next_step(), plan, batch, logits_slices, is_probe, graph))
        if not is_probe:
            return
        capacities = {0: max_tokens_here(batch.num_tokens, batch.num_logits)}
        capacities |= {rank: report.max_tokens for rank, report in link.gather(Capacity).items()}
        rank, max_tokens = min(capacities.items(), key=lambda entry: entry[1])
        is_go = max_tokens >= batch.num_tokens
        link.send(Proceed(link.epoch, link.next_step(), is_go))
        if not is_go:
            raise StepTooLarge(
                f"out of memory: rank {rank} has room for a step of {max_tokens} tokens, not of {batch.num_tokens}"
            )

    def completed(self, num_tokens: int, num_rows: int) -> None:
        """All ranks have computed a step of so many tokens and rows of logits."""
        self._proven_tokens = max(self._proven_tokens, num_tokens)
        self._proven_rows = max(self._proven_rows, num_rows)

    def capture(self, graph: GraphKey) -> None:
        """The followers record this CUDA graph, and rank 0 must too. Raises `DeviceError`."""
        self._link.send(Capture(self._link.epoch, self._link.next_step(), graph))

    def all_captured(self, here: bool) -> bool:
        """True if every rank has recorded the graph that `capture` named. Raises `DeviceError`."""
        reports = self._link.gather(Captured).values()
        return here and all(report.is_there for report in reports)

    def zero_pages(self, pages: list[int]) -> None:
        """Raises `DeviceError`."""
        self._link.send(ZeroPages(self._link.epoch, self._link.next_step(), pages))

    def free_memory(self) -> None:
        """Memory was short on some rank. Raises `DeviceError`."""
        self._proven_tokens = self._proven_rows = 0
        self._link.send(FreeMemory(self._link.epoch, self._link.next_step()))

    def close(self) -> None:
        """Tell the followers to stop."""
        self._link.close()

"""A rank other than 0: computes the batches that rank 0 sends, in the same order, and decides nothing."""

from __future__ import annotations

import logging

from neuron.engine.errors import DeviceError, describe
from neuron.engine.parallel.messages import (
    Capacity,
    Capture,
    Captured,
    Command,
    FollowerLink,
    FreeMemory,
    Proceed,
    RunStep,
    Stop,
    ZeroPages,
)
from neuron.engine.step.runner import ModelRunner

logger = logging.getLogger(__name__)


class Follower:
    """The loop of a follower. Keys and values are its only state, and rank 0 owns the books on them."""

    def __init__(self, runner: ModelRunner, link: FollowerLink) -> None:
        self._runner = runner
        self._link = link

    def run(self) -> None:
        """Returns when rank 0 says so, or when this end of the link was closed.

        Raises `DeviceError`: rank 0 has gone, a message was stale, or a step failed here, where the other ranks are
        already in a collective that this one does not reach.
        """
        while True:
            try:
                command = self._link.receive()
            except DeviceError:
                if self._link.is_closed:
                    return
                raise
            if isinstance(command, Stop):
                return
            self._obey(command)

    def close(self) -> None:
        """Give up the graphs, before the communicator that they use goes with the process."""
        self._runner.close()

    def _obey(self, command: Command) -> None:
        runner = self._runner
        if isinstance(command, RunStep):
            try:
                # First of all: the next message overwrites what the command views.
                batch = runner.unpack(command.batch, command.graph)
                if command.is_probe and not self._is_agreed(command):
                    return
                runner.follow(batch, command.logits_slices, command.graph)
            except DeviceError:
                raise
            except Exception as exc:
                raise DeviceError("rank_fault", f"step {command.plan} failed on this rank: {describe(exc)}") from exc
        elif isinstance(command, Capture):
            is_there = runner.record_graph(command.graph)
            self._link.report(Captured(command.epoch, command.step, is_there))
        elif isinstance(command, ZeroPages):
            runner.zero_pages(command.pages)
        elif isinstance(command, FreeMemory):
            runner.free_memory()
        else:
            raise DeviceError("stale_message", f"{type(command).__name__} came where a step was due")

    def _is_agreed(self, command: RunStep) -> bool:
        """Say whether the step fits here; whether it is computed is for rank 0 to say."""
        max_tokens = self._runner.max_tokens_now(command.batch.num_tokens, command.batch.num_logits)
        self._link.report(Capacity(command.epoch, command.step, max_tokens))
        return self._link.expect(Proceed).is_go

"""Faults that make an engine fail in a chosen way at a chosen place, so that recovery can be tested for real.

They come in `EngineConfig.debug` as `{"levers": [{"lever": "kill", "step": 12, "epochs": [0]}, …]}` and reach a daemon
only where it was started with `--debug-levers`. Without any, the model that runs is the model that was loaded.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Protocol

import msgspec
import torch
from torch import Tensor

from neuron.engine.errors import ModelError

if TYPE_CHECKING:
    from neuron.engine.attention.interface import StepBatch, StepContext

logger = logging.getLogger(__name__)

LoadPhase = Literal["starting", "weights", "kv_cache", "warm_up"]


class _Fault(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="lever"):
    """rank: whom it concerns. epochs: in which lives of the group it acts, 0 being the first; None is all of them."""

    rank: int = 0
    epochs: tuple[int, ...] | None = None


class _StepFault(_Fault, frozen=True, kw_only=True):
    """Acts in one forward pass since loading, counted from 1, or in every one that computes a given token id."""

    step: int | None = None
    token: int | None = None

    def acts_in(self, number: int, token_ids: Tensor) -> bool:
        if self.token is not None:
            return bool((token_ids == self.token).any())
        return number == self.step


class Kill(_StepFault, frozen=True, kw_only=True, tag="kill"):
    """SIGKILL to the own process before the pass."""


class Hang(_StepFault, frozen=True, kw_only=True, tag="hang"):
    """Wait for ever before the pass, as a collective does whose peer is stuck."""


class DeviceFault(_StepFault, frozen=True, kw_only=True, tag="device_fault"):
    """A sticky CUDA error: of a kernel that reads where nothing is, or on a CPU an error that says so."""


class OutOfMemory(_StepFault, frozen=True, kw_only=True, tag="out_of_memory"):
    """This pass and `times - 1` following ones raise the allocator's error."""

    times: int = 1

    def acts_in(self, number: int, token_ids: Tensor) -> bool:
        if self.step is not None and self.token is None:
            return self.step <= number < self.step + self.times
        return _StepFault.acts_in(self, number, token_ids)


class Poison(_StepFault, frozen=True, kw_only=True, tag="poison"):
    """The logits of one row become NaN or infinite: row `row` of a step, or the rows whose chunk has the token."""

    row: int = 0
    value: Literal["nan", "inf"] = "nan"

    def rows(self, batch: StepBatch) -> list[int]:
        wanted: list[int] = batch.logits_indices.tolist()
        if self.token is None:
            return [self.row] if self.row < len(wanted) else []
        has_token: list[bool] = (batch.token_ids == self.token).tolist()
        rows: list[int] = []
        begin = 0
        for length in batch.query_lens_host:
            if any(has_token[begin : begin + length]) and begin + length - 1 in wanted:
                rows.append(wanted.index(begin + length - 1))
            begin += length
        return rows


class SlowDisk(_Fault, frozen=True, kw_only=True, tag="slow_disk"):
    """Each megabyte of weights takes so much longer to read."""

    seconds_per_mb: float


class FailLoad(_Fault, frozen=True, kw_only=True, tag="fail_load"):
    """The load ends, or stops for ever, where `phase` begins. The n-th load of a group is that of epoch n - 1."""

    how: Literal["refuse", "kill", "hang"] = "refuse"
    phase: LoadPhase = "weights"


Fault = Kill | Hang | DeviceFault | OutOfMemory | Poison | SlowDisk | FailLoad


class _Debug(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    levers: tuple[Fault, ...] = ()


class Model(Protocol):
    """What a runner needs of a model."""

    def forward(self, ctx: StepContext) -> Tensor: ...

    def compute_logits(self, hidden: Tensor) -> Tensor: ...


class Faults:
    """Those of one rank in one epoch. Raises `ModelError` (`internal`) for a `debug` that is not understood."""

    def __init__(self, debug: dict[str, Any], *, rank: int, epoch: int) -> None:
        try:
            given = msgspec.convert(debug, _Debug).levers
        except msgspec.ValidationError as exc:
            raise ModelError("internal", f"debug levers: {exc}") from exc
        self._faults: list[Fault] = [
            fault for fault in given if fault.rank == rank and (fault.epochs is None or epoch in fault.epochs)
        ]
        self._models: list[_FaultyModel] = []
        for fault in self._faults:
            logger.warning("debug lever: %s", fault)

    def enter(self, phase: LoadPhase) -> None:
        """Where `phase` of loading begins. Raises `ModelError`."""
        for fault in self._faults:
            if isinstance(fault, FailLoad) and fault.phase == phase:
                if fault.how == "kill":
                    _die()
                if fault.how == "hang":
                    _hang()
                raise ModelError("internal", f"a debug lever fails this load at {phase}")

    def slowed(self, progress: Callable[[int, int], None]) -> Callable[[int, int], None]:
        """A progress callback (bytes done, bytes in all) of reading weights, held up as a slow disk would."""
        delays = [fault.seconds_per_mb for fault in self._faults if isinstance(fault, SlowDisk)]
        if not delays:
            return progress
        seen = 0

        def held_up(done: int, total: int) -> None:
            nonlocal seen
            time.sleep(max(done - seen, 0) / 1e6 * sum(delays))
            seen = done
            progress(done, total)

        return held_up

    def around(self, model: Model) -> Model:
        """The model with the faults that act in steps, once `arm` has been called; without any, the model itself."""
        faults = [fault for fault in self._faults if isinstance(fault, _StepFault)]
        if not faults:
            return model
        faulty = _FaultyModel(model, faults)
        self._models.append(faulty)
        return faulty

    def arm(self) -> None:
        """Loading is over: passes count from here."""
        for model in self._models:
            model.is_armed = True


class _FaultyModel:
    def __init__(self, model: Model, faults: Sequence[_StepFault]) -> None:
        self._model = model
        self._faults = faults
        self._number = 0
        self._poison: list[tuple[list[int], float]] = []
        self.is_armed = False

    def forward(self, ctx: StepContext) -> Tensor:
        if self.is_armed:
            self._number += 1
            self._poison = []
            for fault in self._faults:
                if fault.acts_in(self._number, ctx.batch.token_ids):
                    self._inject(fault, ctx.batch)
        return self._model.forward(ctx)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        logits = self._model.compute_logits(hidden)
        for rows, value in self._poison:
            logits[rows] = value
        self._poison = []  # what follows in the same step are logits of prompts
        return logits

    def _inject(self, fault: _StepFault, batch: StepBatch) -> None:
        logger.warning("debug lever pulled in pass %d: %s", self._number, fault)
        if isinstance(fault, Kill):
            _die()
        elif isinstance(fault, Hang):
            _hang()
        elif isinstance(fault, DeviceFault):
            _break_device(batch.token_ids)
        elif isinstance(fault, OutOfMemory):
            raise torch.OutOfMemoryError("out of memory, says a debug lever")
        elif isinstance(fault, Poison):
            self._poison.append((fault.rows(batch), math.nan if fault.value == "nan" else math.inf))


def _die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still here after SIGKILL")


def _hang() -> NoReturn:
    while True:
        threading.Event().wait()


def _break_device(anything: Tensor) -> None:
    """Leave the CUDA context in the state that only a new process heals."""
    if anything.is_cuda:
        beyond = torch.full_like(anything, 2**40)
        anything.gather(0, beyond)  # the bounds check in the kernel is a device-side assert
        torch.cuda.synchronize(anything.device)
    raise RuntimeError("CUDA error: an illegal memory access was encountered (a debug lever)")

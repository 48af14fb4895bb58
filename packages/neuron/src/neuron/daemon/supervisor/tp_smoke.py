"""`neuron tp-smoke`: does tensor parallelism work on these devices? Real rank processes on a tiny random model.

Each rank process joins its group and checks the collectives on known values; the group then answers a few prompts, in
chunks and together, and its greedy answers must be those of one rank alone on the first device.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from neuron.daemon.supervisor.channel import ChannelClosed
from neuron.daemon.supervisor.errors import EngineLoadError
from neuron.daemon.supervisor.process_group import LaunchSettings, ProcessGroup, WorkerCommand, worker_command
from neuron.protocol import EngineConfig, Generate, SamplingParams, StepOutput

_MAX_STEP_TOKENS = 64
_NEW_TOKENS = 16
# One token, a few, and more than two steps take; ids below the vocabulary.
_PROMPTS = tuple([(17 * index + 5) % 509 for index in range(length)] for length in (1, 9, 150))


class RankReport(msgspec.Struct, frozen=True):
    """What one rank process was seen to do. exit_code: None if it had to be killed."""

    rank: int
    pid: int
    device: str
    checks: tuple[str, ...] = ()
    exit_code: int | None = None


class SmokeReport(msgspec.Struct, frozen=True):
    """problem: the first thing that was wrong, None if nothing was. answers: of the group, one for each prompt."""

    ok: bool
    tp_size: int
    devices: tuple[int, ...]
    ranks: tuple[RankReport, ...]
    answers: tuple[tuple[int, ...], ...] = ()
    load_seconds: float = 0.0
    step_ms: float = 0.0
    problem: str | None = None


class SmokeFailed(Exception):
    """A group did not do what it should; the message is for people."""


async def run_smoke(
    *, world_size: int, devices: tuple[int, ...] = (), timeout_s: float = 180.0, command: WorkerCommand = worker_command
) -> SmokeReport:
    """Try `world_size` ranks on CUDA `devices`, or on the CPU without any. Never raises for what it finds."""
    with tempfile.TemporaryDirectory(prefix="neuron-smoke-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(_tiny_model(world_size)))
        group = _Run(Path(folder), devices, world_size, command=command, timeout_s=timeout_s)
        problem: str | None = None
        try:
            await group.run()
            alone = _Run(Path(folder), devices[:1], 1, command=command, timeout_s=timeout_s)
            await alone.run()
            if group.answers != alone.answers:
                problem = f"{world_size} ranks answer {group.answers}, one rank answers {alone.answers}"
        except SmokeFailed as exc:
            problem = str(exc)
        return SmokeReport(
            ok=problem is None,
            tp_size=world_size,
            devices=devices,
            ranks=group.ranks(),
            answers=group.answers,
            load_seconds=group.load_seconds,
            step_ms=group.step_ms,
            problem=problem,
        )


def _tiny_model(world_size: int) -> dict[str, Any]:
    """A `config.json` whose every size divides by the number of ranks, with two query heads for each KV head."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 64 * world_size,
        "num_hidden_layers": 3,
        "num_attention_heads": 2 * world_size,
        "num_key_value_heads": world_size,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    }


class _Run:
    """One group, from spawn to exit."""

    def __init__(
        self, folder: Path, devices: Sequence[int], world_size: int, *, command: WorkerCommand, timeout_s: float
    ) -> None:
        self._devices = tuple(devices)
        self._timeout_s = timeout_s
        self._answers: list[list[int]] = [[] for _ in _PROMPTS]
        self._finished: set[int] = set()
        self._problem: str | None = None
        self._done = asyncio.Event()
        self._checks: list[str] = []
        self._num_steps = 0
        self._seconds = 0.0
        self.load_seconds = 0.0
        config = EngineConfig(
            model_id="tp-smoke",
            path=str(folder),
            devices=self._devices,
            tensor_parallel_size=world_size,
            dtype="float32",
            kv_cache_tokens=1024,
            max_step_tokens=_MAX_STEP_TOKENS,
            max_running=8,
            load_format="dummy",
            collective_timeout_s=timeout_s,
        )
        settings = LaunchSettings(
            runtime_dir=folder, command=command, start_timeout_s=timeout_s, stall_timeout_s=timeout_s
        )
        self._process_group = ProcessGroup(config, settings, on_progress=lambda progress: None, on_step=self._on_step)

    @property
    def answers(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(answer) for answer in self._answers)

    @property
    def step_ms(self) -> float:
        return 1000 * self._seconds / max(self._num_steps, 1)

    def ranks(self) -> tuple[RankReport, ...]:
        return tuple(
            RankReport(
                rank=rank,
                pid=pid,
                device=f"cuda {self._devices[rank]}" if self._devices else "cpu",
                checks=tuple(self._checks),
                exit_code=code,
            )
            for rank, (pid, code) in enumerate(
                zip(self._process_group.pids, self._process_group.exit_codes, strict=True)
            )
        )

    async def run(self) -> None:
        """Raises `SmokeFailed`."""
        process_group = self._process_group
        try:
            async with asyncio.timeout(self._timeout_s):
                loaded = await process_group.load()
                self.load_seconds = loaded.load_seconds
                self._checks += ["joined", "collectives"]
                await self._generate()
                await process_group.stop()
        except TimeoutError:
            raise SmokeFailed(f"not done after {self._timeout_s:.0f} s") from None
        except EngineLoadError as exc:
            raise SmokeFailed(f"the group did not come up ({exc.kind}): {exc.message}") from None
        finally:
            await process_group.kill()
        if any(process_group.exit_codes):
            raise SmokeFailed(f"not every rank left in order: {process_group.describe_exits()}")
        self._checks.append("left in order")

    async def _generate(self) -> None:
        sampling = SamplingParams(temperature=0.0)
        began = time.monotonic()
        try:
            for number, prompt in enumerate(_PROMPTS):
                self._process_group.channel.send(Generate(number, list(prompt), sampling, _NEW_TOKENS))
        except ChannelClosed:
            raise SmokeFailed(self._process_group.describe_exits()) from None
        done = asyncio.ensure_future(self._done.wait())
        await asyncio.wait((done, self._process_group.ended), return_when=asyncio.FIRST_COMPLETED)
        done.cancel()
        if self._problem is not None:
            raise SmokeFailed(self._problem)
        if not self._done.is_set():
            raise SmokeFailed(f"{self._process_group.ended.result()}; {self._process_group.describe_exits()}")
        self._seconds = time.monotonic() - began
        self._checks.append(f"{self._num_steps} steps")

    def _on_step(self, step: StepOutput) -> None:
        self._num_steps += 1
        for update in step.updates:
            self._answers[update.request_id] += update.token_ids
            if update.finish is not None:
                self._finished.add(update.request_id)
        if step.failures:
            self._problem = step.failures[0].message
        if self._problem is not None or len(self._finished) == len(_PROMPTS):
            self._done.set()

"""Engine groups of real rank processes, driven as the daemon drives them but without its requests and recovery."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neuron.daemon.supervisor.process_group import LaunchSettings, ProcessGroup
from neuron.protocol import EngineConfig, EngineProgress, Generate, Loaded, SamplingParams, SequenceUpdate, StepOutput

GREEDY = SamplingParams(temperature=0.0)
DEADLINE_S = 120


class RealGroup:
    """One process_group over a checkpoint. `updates` by request, in order."""

    def __init__(self, folder: Path, checkpoint: Path, *, ranks: int, **fields: Any) -> None:
        fields = {"kv_cache_tokens": 1024, "num_threads": 1, "page_size": 4, "max_step_tokens": 64} | fields
        config = EngineConfig(model_id="tiny", path=str(checkpoint), tensor_parallel_size=ranks, **fields)
        self.progress: list[EngineProgress] = []
        self.steps: list[StepOutput] = []
        self.updates: dict[int, list[SequenceUpdate]] = {}
        self.pongs: list[tuple[int, int]] = []
        self._changed = asyncio.Event()
        self._next_id = 1
        self.process_group = ProcessGroup(
            config,
            LaunchSettings(runtime_dir=folder),
            on_progress=self.progress.append,
            on_step=self._on_step,
            on_pong=self._on_pong,
        )

    async def __aenter__(self) -> RealGroup:
        try:
            async with asyncio.timeout(DEADLINE_S):
                self.loaded: Loaded = await self.process_group.load()
        except BaseException:
            await self.process_group.kill()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.process_group.kill()

    def send(self, prompt_ids: Sequence[int], max_tokens: int = 8, **fields: Any) -> int:
        """Start a sequence; its id."""
        fields.setdefault("sampling", GREEDY)
        number, self._next_id = self._next_id, self._next_id + 1
        self.updates[number] = []
        self.process_group.channel.send(
            Generate(request_id=number, prompt_ids=list(prompt_ids), max_tokens=max_tokens, **fields)
        )
        return number

    async def until(self, condition: Any) -> None:
        """Wait until a step or a pong has made the condition true. Fails when the group ends first."""
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                self._changed.clear()
                changed = asyncio.ensure_future(self._changed.wait())
                await asyncio.wait((changed, self.process_group.ended), return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
                if self.process_group.ended.done() and not condition():
                    raise AssertionError(f"{self.process_group.ended.result()}; {self.process_group.describe_exits()}")

    async def answer(self, *prompts: Sequence[int], max_tokens: int = 8, **fields: Any) -> list[list[int]]:
        """The answers to several prompts that run together."""
        numbers = [self.send(prompt, max_tokens, **fields) for prompt in prompts]
        await self.until(lambda: all(self.is_finished(number) for number in numbers))
        return [self.tokens(number) for number in numbers]

    def is_finished(self, number: int) -> bool:
        updates = self.updates[number]
        return bool(updates) and updates[-1].finish is not None

    def tokens(self, number: int) -> list[int]:
        return [token for update in self.updates[number] for token in update.token_ids]

    def _on_pong(self, rank: int, nonce: int) -> None:
        self.pongs.append((rank, nonce))
        self._changed.set()

    def _on_step(self, step: StepOutput) -> None:
        assert not step.failures, step.failures
        self.steps.append(step)
        for update in step.updates:
            self.updates[update.request_id].append(update)
        self._changed.set()

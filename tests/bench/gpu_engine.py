"""The engine as it serves, on dummy weights: decode steps, first tokens and a mix of requests, timed from outside.

Whatever the engine does inside (CUDA graphs, overlap, its choice of kernels) is in these figures and is no business of
this module: it hands in sequences and takes what each step reports.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from neuron.engine.loading.loading import load_engine
from neuron.protocol import EngineConfig, Generate, SamplingParams, StepOutput

GREEDY = SamplingParams(temperature=0.0)
Request = tuple[list[int], int]
"""Prompt ids and output tokens."""


def mixed_requests(number: int, *, shortest: int, longest: int, vocab_size: int) -> list[Request]:
    """The offline mix of nano-vllm's benchmark with its seed: 256 requests of 100 to 1024 tokens in and out are 142,827
    and 133,966 tokens."""
    rng = random.Random(0)
    prompts = [
        [rng.randint(0, min(10_000, vocab_size - 1)) for _ in range(rng.randint(shortest, longest))]
        for _ in range(number)
    ]
    return [(prompt, rng.randint(shortest, longest)) for prompt in prompts]


def engine_fields(settings: Sequence[str]) -> dict[str, Any]:
    """`FIELD=JSON` as fields of `EngineConfig`. Raises `ValueError` for one that it does not have."""
    fields = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in EngineConfig.__struct_fields__:
            raise ValueError(f"the engine has no setting {name!r}")
        fields[name] = json.loads(value)
    return fields


class EngineUnderTest:
    """One engine on one device, in this process. fields: of `EngineConfig`, over those chosen here."""

    def __init__(
        self, config: dict[str, Any], folder: Path, device: torch.device, *, max_step_tokens: int, **fields: Any
    ) -> None:
        (folder / "config.json").write_text(json.dumps(config))
        self.vocab_size = config["vocab_size"]
        self.max_step_tokens = max_step_tokens
        started = time.perf_counter()
        self.engine, self.loaded = load_engine(
            EngineConfig(
                "bench",
                str(folder),
                **{
                    "devices": () if device.type == "cpu" else (device.index,),
                    "dtype": "float32" if device.type == "cpu" else "bfloat16",
                    "load_format": "dummy",
                    "max_step_tokens": max_step_tokens,
                    "prefix_cache": False,
                    **fields,
                },
            )
        )
        self._next_id = 1
        self._rng = random.Random(1)
        # What the engine would do while nobody asks for anything, as recording the rest of its CUDA graphs.
        while getattr(self.engine, "has_idle_work", False):
            self.engine.work_while_idle()
        self.ready_s = time.perf_counter() - started

    def close(self) -> None:
        self.engine.close()

    def decode_seconds(self, batch: int, context: int, *, steps: int) -> float:
        """Median time between the tokens of `batch` sequences around `context` tokens, all decoding."""
        prefill_steps = -(-batch * context // self.max_step_tokens) + 2
        new_tokens = prefill_steps + steps
        ids = [self._add(self._prompt(max(1, context - new_tokens // 2)), 2 * new_tokens) for _ in range(batch)]
        times: list[float] = []
        while len(times) < steps:
            output = self.engine.step()
            if not self.engine.has_work:
                raise RuntimeError(f"{batch} sequences ended before {steps} steps of all of them were seen")
            if output is None:
                continue
            self._check(output)
            if sum(bool(update.token_ids) for update in output.updates) == batch:
                times.append(time.perf_counter())
            else:
                times.clear()
        for number in ids:
            self.engine.cancel(number)
        self._drain()
        gaps = [after - before for before, after in pairwise(times)]
        return statistics.median(gaps[len(gaps) // 4 :])

    def first_token_seconds(self, length: int, *, rounds: int) -> float:
        """Median time from a prompt's arrival to its first token, with nothing else to do."""
        seconds = []
        for _ in range(rounds + 1):
            started = time.perf_counter()
            self._add(self._prompt(length), 1)
            found = False
            while not found:
                output = self.engine.step()
                if output is not None:
                    self._check(output)
                    found = any(update.token_ids for update in output.updates)
            seconds.append(time.perf_counter() - started)
            self._drain()
        return statistics.median(seconds[1:])

    def offline_tokens_per_s(self, requests: Sequence[Request]) -> float:
        """Output tokens per second of all requests, handed in at once; none ends before its length."""
        self._drain()
        started = time.perf_counter()
        for prompt, new_tokens in requests:
            self._add(prompt, new_tokens)
        produced = 0
        while self.engine.has_work or not self.engine.is_idle:
            output = self.engine.step()
            if output is not None:
                self._check(output)
                produced += sum(len(update.token_ids) for update in output.updates)
        expected = sum(new_tokens for _, new_tokens in requests)
        if produced != expected:
            raise RuntimeError(f"{produced} tokens came where {expected} were due")
        return produced / (time.perf_counter() - started)

    def _prompt(self, length: int) -> list[int]:
        return [self._rng.randrange(self.vocab_size) for _ in range(length)]

    def _add(self, prompt: list[int], new_tokens: int) -> int:
        number, self._next_id = self._next_id, self._next_id + 1
        self.engine.add(Generate(number, prompt, GREEDY, new_tokens))
        return number

    def _drain(self) -> None:
        while self.engine.has_work or not self.engine.is_idle:
            self.engine.step()

    @staticmethod
    def _check(output: StepOutput) -> None:
        if output.failures:
            raise RuntimeError(f"a sequence failed: {output.failures[0].message}")

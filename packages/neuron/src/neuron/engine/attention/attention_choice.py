"""Choice of another library's attention for prompt chunks: tried for correctness and timed once, at start-up."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from neuron.engine import kernels
from neuron.engine.attention.attention_plugins import PrefillPlugin, installed_plugins
from neuron.engine.errors import is_device_fault
from neuron.engine.layers.gemm_autotune import agree
from neuron.engine.parallel.group import ParallelGroup

if TYPE_CHECKING:
    from neuron.engine.attention.attention_triton import TritonAttention

logger = logging.getLogger(__name__)

# Ours prefers itself: a plug-in must be faster by this much.
_MIN_GAIN = 0.05
# The largest distance of two right results, relative to the largest value.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
_BUDGET_S = 10.0

Attend = Callable[[PrefillPlugin | None], Tensor]
Measure = Callable[[Callable[[], object]], float]


@dataclass(frozen=True, slots=True)
class HeadShape:
    """Of one rank's attention. windows: of the model's layers."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: torch.dtype
    windows: frozenset[int | None]


def pick(
    plugins: Sequence[PrefillPlugin],
    trials: Sequence[Attend],
    timed: Attend,
    measure: Measure,
    *,
    dtype: torch.dtype,
    budget_s: float = _BUDGET_S,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """0 for our kernel, or 1 + the index of the plug-in to take.

    A plug-in is out if it raises, if a trial's result is not ours within rounding, or if it is not clearly faster on
    `timed`. Raises what leaves the device unusable.
    """
    deadline = clock() + budget_s
    best, best_seconds = 0, (1.0 - _MIN_GAIN) * measure(lambda: timed(None)) if plugins else 0.0
    for index, plugin in enumerate(plugins, start=1):
        if clock() >= deadline:
            break
        try:
            wrong = next(
                (error for error in (_error(trial, plugin) for trial in trials) if error > _TOLERANCE[dtype]), None
            )
            if wrong is not None:
                logger.warning("attention of %s is not used: it differs from ours by %.2g", plugin.name, wrong)
                continue
            seconds = measure(lambda plugin=plugin: timed(plugin))  # type: ignore[misc]
        except Exception as exc:
            if is_device_fault(exc):
                raise
            logger.info("attention of %s is not used: %s", plugin.name, str(exc).partition("\n")[0])
            continue
        if seconds < best_seconds:
            best, best_seconds = index, seconds
    return best


def _error(trial: Attend, plugin: PrefillPlugin) -> float:
    """Largest difference of a trial's results, relative to the largest value; infinite where one is not a number."""
    expected = trial(None).float()
    difference = (trial(plugin).float() - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
    return float(difference.nan_to_num(float("inf")))


def choose_prefill_plugin(
    backend: TritonAttention, shape: HeadShape, group: ParallelGroup, device: torch.device
) -> None:
    """Let `backend` use the best plug-in for prompt chunks, the same on all ranks of a group, which call it together.

    Does nothing where our kernels do not run.
    """
    if not kernels.is_available(device):
        return
    began = time.perf_counter()
    missing: list[str] = []
    plugins = list(installed_plugins(lambda name, reason: missing.append(f"{name} ({reason})")))
    choice = 0
    if group.rank == 0 and plugins:
        with torch.inference_mode():
            trials = [_problem(backend, shape, window, [(40, 40), (33, 100)], device) for window in shape.windows]
            widest = None if None in shape.windows else max(window for window in shape.windows if window is not None)
            timed = _problem(backend, shape, widest, [(2048, 2048), (512, 4096)], device)
            choice = pick(plugins, trials, timed, _event_seconds, dtype=shape.dtype)
    (choice,) = agree([choice], 1, group, device)
    backend.prefill_plugin = plugins[choice - 1] if choice else None
    logger.info(
        "attention of prompts: %s, chosen in %.2f s; not here: %s",
        plugins[choice - 1].name if choice else "ours",
        time.perf_counter() - began,
        ", ".join(missing) or "none",
    )


def _problem(
    backend: TritonAttention,
    shape: HeadShape,
    window: int | None,
    chunks: list[tuple[int, int]],
    device: torch.device,
) -> Attend:
    """Attention of chunks (query length, context length) over random pages, by our kernel or by a plug-in."""
    from neuron.engine.attention.interface import StepBatch

    counts = [-(-context // shape.page_size) for _, context in chunks]
    order = torch.randperm(sum(counts)) + 1
    tables = torch.zeros(len(chunks), max(counts), dtype=torch.int32)
    taken = 0
    for row, count in enumerate(counts):
        tables[row, :count] = order[taken : taken + count]
        taken += count
    query_lens, context_lens = [query for query, _ in chunks], [context for _, context in chunks]
    start = torch.tensor([0, *torch.tensor(query_lens).cumsum(0).tolist()], dtype=torch.int32)
    total = sum(query_lens)
    nothing = torch.zeros(total, dtype=torch.int64, device=device)
    batch = StepBatch(
        token_ids=nothing,
        positions=nothing,
        slot_mapping=nothing,
        query_start=start.to(device),
        context_lens=torch.tensor(context_lens, dtype=torch.int32).to(device),
        page_tables=tables.to(device),
        logits_indices=nothing[:0],
        query_lens_host=query_lens,
        context_lens_host=context_lens,
        num_decodes=0,
        max_query_len=max(query_lens),
        max_context_len=max(context_lens),
    )
    q = torch.randn(total, shape.num_heads, shape.head_dim, device=device).to(shape.dtype)
    pages = torch.randn(sum(counts) + 1, 2, shape.page_size, shape.num_kv_heads, shape.head_dim, device=device).to(
        shape.dtype
    )

    def attend(plugin: PrefillPlugin | None) -> Tensor:
        before, backend.prefill_plugin = backend.prefill_plugin, plugin
        try:
            backend.prepare(batch)
            return backend.attend(q, pages, batch, scale=shape.head_dim**-0.5, sliding_window=window)
        finally:
            backend.prefill_plugin = before

    return attend


def _event_seconds(work: Callable[[], object]) -> float:
    """Device time of `work`, launched from the host as prompts are; the best of three."""
    work()
    seconds: list[float] = []
    for _ in range(3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        work()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return min(seconds)

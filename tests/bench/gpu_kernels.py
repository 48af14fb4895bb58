"""The kernels by themselves: right against float64 references, and how near to the device's limits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from gpu_steps import PAGE_SIZE, pages_for, step_batch, step_plan
from gpu_timing import Ceilings, Timer, Work
from neuron.engine.attention.attention_triton import TritonAttention
from neuron.engine.kernels.activation import silu_mul
from neuron.engine.kernels.attention.rotary import rotate_and_write
from neuron.engine.kernels.attention.tiling import Tiling, chip_of
from neuron.engine.kernels.gemm.gemm import SPLIT_MAX_ROWS, invariant_linear, split_linear
from neuron.engine.kernels.gemm.gemv import MAX_ROWS as VECTOR_MAX_ROWS
from neuron.engine.kernels.gemm.gemv import vector_linear
from neuron.engine.kernels.norm import add_rms_norm
from neuron.engine.kernels.sampling.sampling import SampledRows, sample
from neuron.engine.layers import norm as torch_norm
from neuron.engine.sampling.sampling_noise import noise_key
from torch import Tensor

from tests.kernels.cases import AttentionCase

Row = dict[str, Any]
# Together larger than the L2 cache of any GPU, so that each call finds its inputs in memory.
_WORKING_SET_BYTES = 512 * 2**20


def check_attention(device: torch.device, *, small: bool) -> Iterator[Row]:
    """Mixed steps against float64 attention without pages; every unused cell holds NaN."""
    step = [(1, 90), (1, 17), (20, 50)] if small else [(1, 700), (1, 17), (1, 5000), (300, 300), (50, 2000), (700, 900)]
    decodes = 2 if small else 3
    cases: list[tuple[str, torch.dtype, dict[str, Any], int | None]] = [
        ("fp32", torch.float32, {"group": 2, "head_dim": 64}, None),
        ("fp16, window", torch.float16, {"group": 4, "head_dim": 128}, 40),
    ]
    if not small:
        cases += [
            ("bf16", torch.bfloat16, {"group": 4, "head_dim": 128, "num_kv_heads": 8}, None),
            ("bf16, head 80, group 7", torch.bfloat16, {"group": 7, "head_dim": 80}, None),
            ("bf16, head 256, group 8", torch.bfloat16, {"group": 8, "head_dim": 256}, 1000),
            ("bf16, head 64, group 1", torch.bfloat16, {"group": 1, "head_dim": 64, "num_kv_heads": 4}, None),
        ]
    for name, dtype, shape, window in cases:
        case = AttentionCase(step, num_decodes=decodes, dtype=dtype, device=device, **shape)
        backend = TritonAttention()
        backend.prepare(case.batch)
        actual = backend.forward(case.q, case.k, case.v, case.kv, case.batch, scale=case.scale, sliding_window=window)
        yield _checked(f"attention {name}", actual, case.expected(window=window), dtype)


def _checked(name: str, actual: Tensor, expected: Tensor, dtype: torch.dtype) -> Row:
    error = (actual.cpu().double() - expected.cpu().double()).abs().max().item()
    limit = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype] * (1 + expected.abs().max().item())
    # NaN compares false and so fails.
    return {"check": name, "max_error": error, "limit": limit, "ok": error <= limit}


def check_small_operations(device: torch.device, *, small: bool) -> Iterator[Row]:
    tokens, hidden = (3, 96) if small else (100, 4096)
    dtype = torch.float32 if small else torch.bfloat16
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    x, residual, weight = normal(tokens, hidden), normal(tokens, hidden), normal(hidden)
    actual, _ = add_rms_norm(x.to(device), residual.to(device, copy=True), weight.to(device), 1e-6)
    exact = torch_norm.rms_norm((x + residual).double(), weight.double(), 1e-6)
    yield _checked("add_rms_norm", actual, exact, dtype)
    gate_up = normal(tokens, 2 * hidden)
    gate, up = gate_up.double().chunk(2, dim=-1)
    yield _checked("silu_mul", silu_mul(gate_up.to(device)), torch.nn.functional.silu(gate) * up, dtype)

    weight = normal(*((40, 200) if small else (4096, 12288)))
    many = normal(5 if small else 300, weight.shape[1])
    for rows in (1, 4, 16):
        for product in _products(rows):
            x = many[:rows]
            exact = x.double() @ weight.double().T
            yield _checked(f"{product.__name__} of {rows} rows", product(x.to(device), weight.to(device)), exact, dtype)
    together = invariant_linear(many.to(device), weight.to(device))
    alone = torch.cat([invariant_linear(row[None].to(device), weight.to(device)) for row in many[:5]])
    differing = int((together[:5] != alone).sum())
    yield {
        "check": "an invariant product's bits, alone and in a batch", "max_error": differing, "limit": 0,
        "ok": small or not differing,  # the interpreter's product is BLAS's
    }  # fmt: skip

    vocab = 2000 if small else 151936
    logits = torch.randn(4, vocab, generator=generator) * 3
    rows = _sample(logits.to(device), [(0.0, 0, 1.0), (0.6, 20, 0.95), (1.0, 0, 0.9), (1.0, 0, 1.0)])
    tokens_drawn = rows.tokens.cpu()
    exact_logprobs = torch.log_softmax(logits.double(), -1).gather(1, tokens_drawn[:, None])[:, 0]
    yield _checked("sampled logprobs", rows.logprobs, exact_logprobs, torch.float32)
    greedy_ok = int(tokens_drawn[0]) == int(logits[0].argmax())
    rank = int((logits[1] > logits[1, tokens_drawn[1]]).sum())
    yield {"check": "greedy and top-k", "max_error": rank, "limit": 19, "ok": greedy_ok and rank < 20}


def _products(rows: int) -> list[Callable[[Tensor, Tensor], Tensor]]:
    """Ours for so many rows."""
    products: list[Callable[[Tensor, Tensor], Tensor]] = [invariant_linear]
    if rows <= SPLIT_MAX_ROWS:
        products.append(split_linear)
    if rows <= VECTOR_MAX_ROWS:
        products.append(vector_linear)
    return products


def _sample(logits: Tensor, kinds: list[tuple[float, int, float]]) -> SampledRows:
    device = logits.device
    temperatures, top_ks, top_ps = zip(*kinds, strict=True)
    return sample(
        logits,
        torch.tensor(temperatures, device=device),
        torch.tensor(top_ks, dtype=torch.int32, device=device),
        torch.tensor(top_ps, device=device),
        torch.zeros(len(kinds), device=device),
        torch.tensor([noise_key(seed, 0) for seed in range(len(kinds))], device=device),
    )


@dataclass(frozen=True)
class Shapes:
    """Of the model whose kernels are timed."""

    heads: int
    kv_heads: int
    dim: int
    hidden: int
    intermediate: int
    vocab: int
    decodes: tuple[tuple[int, int], ...]
    prefills: tuple[int, ...]
    batches: tuple[int, ...]


QWEN3_8B = Shapes(
    heads=32,
    kv_heads=8,
    dim=128,
    hidden=4096,
    intermediate=12288,
    vocab=151936,
    decodes=((1, 640), (32, 640), (256, 640), (1, 8192), (32, 8192)),
    prefills=(1024, 8192),
    batches=(1, 32, 256),
)
TINY = Shapes(2, 1, 32, 64, 96, 500, ((1, 40), (3, 20)), (32,), (2,))


class KernelTimes:
    """Times kernels at the shapes of Qwen3-8B, each call on other memory."""

    def __init__(self, timer: Timer, ceilings: Ceilings, *, small: bool) -> None:
        self._timer = timer
        self._ceilings = ceilings
        self._small = small
        self._shapes = TINY if small else QWEN3_8B
        self._dtype = torch.float32 if small else torch.bfloat16

    def rows(self) -> Iterator[Row]:
        for batch, context in self._shapes.decodes:
            yield self._attention(f"decode attention {batch} x {context}", batch, context, 1)
        for length in self._shapes.prefills:
            yield self._attention(f"prefill attention {length}", 1, length, length)
        yield from self.products()
        for batch in self._shapes.batches:
            yield self._add_rms_norm(batch)
            yield self._silu_mul(batch)
            yield self._rotary(batch)
            yield self._sampling(batch, "greedy", (0.0, 0, 1.0))
            yield self._sampling(batch, "T 0.6, top-k 20, top-p 0.95", (0.6, 20, 0.95))

    def products(self) -> Iterator[Row]:
        """A layer's matrix products, ours beside the library's; the floor is the weight's way from memory."""
        shapes = self._shapes
        heads = (shapes.heads + 2 * shapes.kv_heads) * shapes.dim
        layers = {
            "qkv": (heads, shapes.hidden),
            "o": (shapes.hidden, shapes.heads * shapes.dim),
            "gate/up": (2 * shapes.intermediate, shapes.hidden),
            "down": (shapes.hidden, shapes.intermediate),
        }
        if self._small:
            layers = {"gate/up": (32, shapes.hidden)}
        for name, (num_out, k) in layers.items():
            weights = self._several(num_out, k)
            for rows in (1,) if self._small else (1, 2, 4, 8, 16, 64):
                x = self._normal(rows, k)
                moved = (num_out * k + rows * (num_out + k)) * self._dtype.itemsize
                for product in (torch.nn.functional.linear, *_products(rows)):
                    works: list[Work] = [partial(product, x, weight) for weight in weights]
                    label = "library" if product is torch.nn.functional.linear else product.__name__
                    yield self._row(
                        f"{name} {num_out} x {k}, {rows} rows, {label}", works, num_bytes=moved,
                        flops=2 * rows * num_out * k,
                    )  # fmt: skip
                if name == "gate/up":
                    for gated in (vector_linear,) * (rows <= VECTOR_MAX_ROWS) + (split_linear,) * (rows <= 16):
                        works = [partial(gated, x, weight, gated=True) for weight in weights]
                        yield self._row(f"{name} with SiLU, {rows} rows, {gated.__name__}", works, num_bytes=moved)

    def sweep(self) -> Iterator[Row]:
        """Attention with other tile shapes than those that ship: what changing `kernels.attention.tiling` is worth."""
        programs = chip_of(self._timer.device).num_multiprocessors
        for batch in self._shapes.batches:
            for changes in (
                {},
                *({"min_segment_tokens": tokens} for tokens in (64, 256, 512)),
                *({"num_stages": stages} for stages in (3, 7)),
                *({"max_programs": programs * each} for each in (2, 4, 8)),
                {"block_n": 32},
                {"block_n": 128, "num_stages": 3},
                {"num_warps": 2},
            ):
                yield self._tuned(f"decode attention of {batch}", batch, 1, changes)
        for changes in (
            {},
            {"block_n": 128},
            {"block_n": 128, "num_stages": 3},
            {"num_warps": 4},
            {"num_stages": 3},
            {"skip_masks": False},
        ):
            yield self._tuned("prefill attention", 1, self._shapes.prefills[-1], changes)

    def _tuned(self, name: str, batch: int, query: int, changes: dict[str, Any]) -> Row:
        context = query if query > 1 else self._shapes.decodes[0][1]
        label = f"{name} {changes or 'as shipped'}"
        try:
            return self._attention(label, batch, context, query, lambda tiling: replace(tiling, **changes))
        except Exception as error:  # a shape that does not fit the chip is an answer too
            return {"kernel": label, "error": f"{type(error).__name__}: {str(error)[:120]}"}

    def _row(self, name: str, works: list[Work], *, num_bytes: float, flops: float = 0.0) -> Row:
        seconds = self._timer.device_seconds(works)
        floor = self._ceilings.seconds(num_bytes=num_bytes, flops=flops)
        return {"kernel": name, "us": seconds * 1e6, "floor_us": floor * 1e6, "fraction": floor / seconds}

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self._timer.device).to(self._dtype)

    def _several(self, *shape: int) -> list[Tensor]:
        num_bytes = math.prod(shape) * self._dtype.itemsize
        copies = 2 if self._small else max(2, min(32, _WORKING_SET_BYTES // num_bytes))
        return [self._normal(*shape) for _ in range(copies)]

    def _attention(
        self, name: str, batch: int, context: int, query: int, tune: Callable[[Tiling], Tiling] = lambda tiling: tiling
    ) -> Row:
        shapes = self._shapes
        step = step_batch(step_plan(batch, context_len=context, query_len=query), self._timer.device)
        caches = self._several(pages_for(batch, context), 2, PAGE_SIZE, shapes.kv_heads, shapes.dim)
        q = self._normal(batch * query, shapes.heads, shapes.dim)
        backend = TritonAttention(tune)
        backend.prepare(step)
        works: list[Work] = [
            partial(backend.attend, q, kv, step, scale=shapes.dim**-0.5, sliding_window=None) for kv in caches
        ]
        # The plan of prefill blocks is copied from the host, which a graph cannot capture: it is made here.
        works[0]()
        pairs = batch * context if query == 1 else query * (query + 1) / 2
        moved = (caches[0].numel() + 2 * q.numel()) * self._dtype.itemsize
        return self._row(name, works, num_bytes=moved, flops=4 * pairs * shapes.heads * shapes.dim)

    def _add_rms_norm(self, batch: int) -> Row:
        xs = self._several(batch, self._shapes.hidden)
        residuals = self._several(batch, self._shapes.hidden)
        weight = self._normal(self._shapes.hidden)
        works: list[Work] = [
            partial(add_rms_norm, x, residual, weight, 1e-6) for x, residual in zip(xs, residuals, strict=True)
        ]
        return self._row(f"add_rms_norm {batch}", works, num_bytes=4 * xs[0].numel() * self._dtype.itemsize)

    def _silu_mul(self, batch: int) -> Row:
        inputs = self._several(batch, 2 * self._shapes.intermediate)
        works: list[Work] = [partial(silu_mul, gate_up) for gate_up in inputs]
        return self._row(f"silu_mul {batch}", works, num_bytes=1.5 * inputs[0].numel() * self._dtype.itemsize)

    def _rotary(self, batch: int) -> Row:
        shapes, device = self._shapes, self._timer.device
        step = step_batch(step_plan(batch, context_len=17, query_len=1), device)
        packed = self._several(batch, (shapes.heads + 2 * shapes.kv_heads) * shapes.dim)
        kv = self._normal(pages_for(batch, 17), 2, PAGE_SIZE, shapes.kv_heads, shapes.dim)
        table = torch.ones(64, shapes.dim, device=device)
        weight = self._normal(shapes.dim)
        works: list[Work] = [
            partial(
                rotate_and_write, qkv, step.positions, table, kv, step.slot_mapping, num_heads=shapes.heads,
                num_kv_heads=shapes.kv_heads, head_dim=shapes.dim, q_weight=weight, k_weight=weight, eps=1e-6,
            )
            for qkv in packed
        ]  # fmt: skip
        moved = 2 * packed[0].numel() * self._dtype.itemsize
        return self._row(f"qk-norm, rotary, page write {batch}", works, num_bytes=moved)

    def _sampling(self, batch: int, name: str, kind: tuple[float, int, float]) -> Row:
        device, vocab = self._timer.device, self._shapes.vocab
        copies = 2 if self._small else max(2, min(8, _WORKING_SET_BYTES // (4 * batch * vocab)))
        temperature, top_k, top_p = kind
        parameters = (
            torch.full((batch,), temperature, device=device),
            torch.full((batch,), top_k, dtype=torch.int32, device=device),
            torch.full((batch,), top_p, device=device),
            torch.zeros(batch, device=device),
            torch.arange(batch, device=device),
        )
        works: list[Work] = [
            partial(sample, torch.randn(batch, vocab, device=device) * 3, *parameters) for _ in range(copies)
        ]
        return self._row(f"sampling {batch}, {name}", works, num_bytes=4 * batch * vocab)

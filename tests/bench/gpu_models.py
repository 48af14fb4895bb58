"""Whole models: our engine on dummy weights, and `transformers` on the same shapes in the same run."""

from __future__ import annotations

import gc
import inspect
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from gpu_engine import EngineUnderTest, Request, mixed_requests
from gpu_steps import PAGE_SIZE, pages_for, step_batch, step_plan
from gpu_timing import Ceilings, Timer
from neuron.engine.attention.attention import make_attention_backend
from neuron.engine.attention.interface import StepContext
from neuron.engine.kv_cache.kv_cache import KVLayout, PagedKV
from neuron.engine.models.registry import build_model
from neuron.engine.weights.loader import load_weights
from torch import Tensor

_QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "max_position_embeddings": 40960,
    "vocab_size": 151936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "attention_bias": False,
    "hidden_act": "silu",
}
SHAPES: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": _QWEN3
    | {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "Qwen3-8B": _QWEN3
    | {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
}
TINY = _QWEN3 | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 500,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}

Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is measured: decode at (batch, context) over `steps` steps, prompts of these lengths, and a mix of
    `num_requests` whose prompts and answers have `shortest` to `longest` tokens; new_tokens: of the peer's generate."""

    decodes: tuple[tuple[int, int], ...]
    prompts: tuple[int, ...]
    new_tokens: int
    steps: int
    rounds: int
    num_requests: int
    shortest: int
    longest: int

    def requests(self, config: dict[str, Any]) -> list[Request]:
        return mixed_requests(
            self.num_requests, shortest=self.shortest, longest=self.longest, vocab_size=config["vocab_size"]
        )


@dataclass(frozen=True)
class Work:
    """Bytes and operations of one step, from the shapes (`config.json` names)."""

    num_bytes: float
    flops: float

    @classmethod
    def of(cls, config: dict[str, Any], *, tokens: int, rows: int, cached: float, pairs: float, itemsize: int) -> Work:
        """cached: cells of K and V that are read, over all sequences; pairs: (query, key) pairs that attend."""
        hidden, layers, dim = config["hidden_size"], config["num_hidden_layers"], config["head_dim"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        body = layers * (
            hidden * (heads + 2 * kv_heads) * dim + heads * dim * hidden + 3 * hidden * config["intermediate_size"]
        )
        head = hidden * config["vocab_size"]
        kv_bytes = layers * 2 * kv_heads * dim * itemsize * cached
        attention = 4 * layers * heads * dim * pairs
        return cls((body + head) * itemsize + kv_bytes, 2 * (body * tokens + head * rows) + attention)


def floor_seconds(
    ceilings: Ceilings, config: dict[str, Any], *, batch: int, context: int, query: int, itemsize: int
) -> float:
    pairs = batch * context if query == 1 else batch * query * (query + 1) / 2
    work = Work.of(config, tokens=batch * query, rows=batch, cached=batch * context, pairs=pairs, itemsize=itemsize)
    return ceilings.seconds(num_bytes=work.num_bytes, flops=work.flops)


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def offline_floor_seconds(
    ceilings: Ceilings, config: dict[str, Any], requests: Sequence[Request], *, itemsize: int
) -> float:
    """The least time for a mix that is handed in at once: every prompt's arithmetic, then one step after the other,
    each reading the weights once and the cache of whoever is not done yet."""
    seconds = 0.0
    for prompt, _ in requests:
        length = len(prompt)
        work = Work.of(config, tokens=length, rows=1, cached=0, pairs=length * (length + 1) / 2, itemsize=itemsize)
        seconds += work.flops / ceilings.flops_per_s
    for step in range(1, max(new_tokens for _, new_tokens in requests)):
        contexts = [len(prompt) + step for prompt, new_tokens in requests if new_tokens > step]
        cells = sum(contexts)
        work = Work.of(config, tokens=len(contexts), rows=len(contexts), cached=cells, pairs=cells, itemsize=itemsize)
        seconds += ceilings.seconds(num_bytes=work.num_bytes, flops=work.flops)
    return seconds


class Peer:
    """`transformers` with random weights of the same shape."""

    def __init__(self, config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> None:
        import transformers

        transformers.logging.set_verbosity_error()
        self._transformers = transformers
        self.device = device
        fields = {name: value for name, value in config.items() if name not in ("model_type", "architectures")}
        with torch.device(device):
            self.model = transformers.AutoModelForCausalLM.from_config(
                transformers.AutoConfig.for_model("qwen3", **fields), dtype=dtype, attn_implementation="sdpa"
            ).eval()
        self.vocab_size = config["vocab_size"]

    @torch.inference_mode()
    def prompt_seconds(self, timer: Timer, length: int) -> float:
        """Prefill of one prompt, up to its first token on the host."""
        ids = torch.randint(self.vocab_size, (1, length), device=self.device)

        def run() -> int:
            logits = self.model(input_ids=ids, use_cache=True, logits_to_keep=1).logits
            return int(logits.argmax())

        return statistics.median(timer.wall_seconds(run))

    @torch.inference_mode()
    def decode_seconds(self, *, batch: int, context: int, new_tokens: int, static: bool) -> float:
        """Median time between tokens of `generate` around `context`. static: static cache, which it compiles."""
        transformers = self._transformers
        times: list[float] = []

        class Clock(transformers.StoppingCriteria):  # type: ignore[misc,name-defined]
            def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
                if input_ids.device.type == "cuda":
                    torch.cuda.synchronize(input_ids.device)
                times.append(time.perf_counter())
                return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

        ids = torch.randint(self.vocab_size, (batch, context - new_tokens // 2), device=self.device)
        self.model.generation_config = transformers.GenerationConfig(
            do_sample=False, pad_token_id=0, eos_token_id=None, use_cache=True
        )
        options: dict[str, Any] = {"cache_implementation": "static"} if static else {}
        self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            stopping_criteria=transformers.StoppingCriteriaList([Clock()]),
            **options,
        )
        gaps = [after - before for before, after in pairwise(times)]
        # The first gaps of a static cache are compilation and graph capture.
        return statistics.median(gaps[len(gaps) // 2 :])

    def continuous_tokens_per_s(self, requests: Sequence[Request]) -> float:
        """Output tokens per second of its continuous batching, all requests handed in at once."""
        generation = self._transformers.GenerationConfig(
            do_sample=False, pad_token_id=0, eos_token_id=None, max_new_tokens=max(number for _, number in requests)
        )
        manager = self.model.init_continuous_batching(generation_config=generation)
        manager.warmup()
        manager.start()
        try:
            started = time.perf_counter()
            for prompt, new_tokens in requests:
                manager.add_request(input_ids=prompt, max_new_tokens=new_tokens)
            produced = finished = 0
            while finished < len(requests):
                result = manager.get_result(timeout=1.0)
                if result is None:
                    if not manager.is_running():
                        raise RuntimeError("its generation thread has ended")
                    continue
                if result.error is not None:
                    raise RuntimeError(f"a request failed: {result.error}")
                if result.is_finished():
                    finished += 1
                    produced += len(result.generated_tokens)
            return produced / (time.perf_counter() - started)
        finally:
            # Newer versions can be told not to finish what is in flight.
            can_insist = "hard_stop" in inspect.signature(manager.stop).parameters
            manager.stop(block=True, timeout=20.0, **({"hard_stop": True} if can_insist else {}))
            if hasattr(manager, "destroy"):
                manager.destroy()


@torch.inference_mode()
def check_against_peer(device: torch.device, dtype: torch.dtype, *, small: bool) -> Row:
    """The same checkpoint, written by `transformers` and read by our loader: logits of a prompt in two chunks."""
    config = TINY if small else SHAPES["Qwen3-0.6B"]
    length, first = (20, 12) if small else (600, 400)
    peer = Peer(config, device, dtype)
    with tempfile.TemporaryDirectory() as folder:
        peer.model.save_pretrained(folder)
        model = build_model(config, device=device, dtype=dtype)
        load_weights(model, Path(folder))
    plan = step_plan(1, context_len=length, query_len=length, vocab_size=config["vocab_size"])
    chunk = plan.chunks[0]
    ids = torch.tensor([chunk.sequence.tokens], device=device)
    expected = peer.model(input_ids=ids).logits[0].float()
    shape = model.config
    layout = KVLayout.uniform(shape.num_layers, model.local.num_kv_heads, shape.head_dim, PAGE_SIZE, dtype)
    kv = PagedKV(layout, pages_for(1, length), device)
    attention = make_attention_backend(device)
    parts = []
    for start, size in ((0, first), (first, length - first)):
        chunk.start, chunk.num_tokens = start, size
        plan.num_tokens = size
        batch = step_batch(plan, device)
        attention.prepare(batch)
        parts.append(model.compute_logits(model.forward(StepContext(batch, kv, attention))))
    actual = torch.cat(parts)
    error = (actual - expected).norm() / expected.norm()
    # In bf16 both sides round at every layer; the relative distance of two correct ones is about a hundredth.
    limit = 1e-4 if dtype == torch.float32 else 5e-2
    agreement = (actual.argmax(-1) == expected.argmax(-1)).float().mean()
    return {
        "check": f"logits of {'a tiny model' if small else 'Qwen3-0.6B shapes'} in two chunks against transformers",
        "max_error": error.item(),
        "limit": limit,
        "ok": error.item() <= limit,
        "same_best_token": agreement.item(),
    }


def measure_engine(
    name: str, config: dict[str, Any], engine: EngineUnderTest, ceilings: Ceilings, plan: Plan, *, itemsize: int
) -> Iterator[Row]:
    """Decode steps and first tokens of the engine as it serves."""
    for batch, context in plan.decodes:
        floor = floor_seconds(ceilings, config, batch=batch, context=context, query=1, itemsize=itemsize)
        seconds = engine.decode_seconds(batch, context, steps=plan.steps)
        yield _row(name, "decode", batch, context, floor, seconds)
    for length in plan.prompts:
        floor = floor_seconds(ceilings, config, batch=1, context=length, query=length, itemsize=itemsize)
        yield _row(name, "prefill", 1, length, floor, engine.first_token_seconds(length, rounds=plan.rounds))


def _row(name: str, case: str, batch: int, context: int, floor: float, seconds: float) -> Row:
    return {
        "model": name, "case": case, "batch": batch, "context": context,
        "floor_ms": floor * 1e3, "engine_ms": seconds * 1e3, "fraction": floor / seconds,
    }  # fmt: skip


def measure_offline(
    name: str, config: dict[str, Any], engine: EngineUnderTest, ceilings: Ceilings, plan: Plan, *, itemsize: int
) -> Iterator[Row]:
    """The mix of requests through the engine."""
    requests = plan.requests(config)
    floor = offline_floor_seconds(ceilings, config, requests, itemsize=itemsize)
    new_tokens = sum(new_tokens for _, new_tokens in requests)
    rate = engine.offline_tokens_per_s(requests)
    yield {
        "model": name,
        "requests": len(requests),
        "prompt_tokens": sum(len(prompt) for prompt, _ in requests),
        "output_tokens": new_tokens,
        "tokens_per_s": rate,
        "floor_tokens_per_s": new_tokens / floor,
        "fraction": rate * floor / new_tokens,
    }


def compare_static(rows: Sequence[Row], peer: Peer, plan: Plan, timer: Timer, *, compiled: bool) -> Iterator[Row]:
    """The peer's `generate` at the same batches and its prefill, written into our rows; yields what it did.

    compiled: with its static cache, which it compiles; otherwise as it comes. What is most telling comes first.
    """
    for row in sorted(rows, key=lambda row: (row["case"] != "decode", row["batch"] not in (1, 32), row["batch"])):
        started = time.perf_counter()
        if row["case"] == "prefill":
            if "peer_eager_ms" in row:
                continue
            key, seconds = "peer_eager_ms", peer.prompt_seconds(timer, row["context"])
        else:
            key = "peer_static_ms" if compiled else "peer_eager_ms"
            seconds = peer.decode_seconds(
                batch=row["batch"], context=row["context"], new_tokens=plan.new_tokens, static=compiled
            )
        row[key] = seconds * 1e3
        best = min(row[key] for key in ("peer_eager_ms", "peer_static_ms") if key in row)
        row["ratio_to_peer"] = best / row["engine_ms"]
        free()
        took = time.perf_counter() - started
        yield {"model": row["model"], "case": row["case"], "batch": row["batch"], key: row[key], "took_s": took}


def compare_continuous(rows: Sequence[Row], peer: Peer, plan: Plan, config: dict[str, Any]) -> Iterator[Row]:
    """The peer's continuous batching on the same mix, written into our row."""
    for row in rows:
        row["peer_tokens_per_s"] = peer.continuous_tokens_per_s(plan.requests(config))
        row["ratio_to_peer"] = row["tokens_per_s"] / row["peer_tokens_per_s"]
        yield {"model": row["model"], "peer_tokens_per_s": row["peer_tokens_per_s"]}

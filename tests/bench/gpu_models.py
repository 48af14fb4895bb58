"""Whole models: our runner on dummy weights, and `transformers` on the same shapes in the same run."""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from gpu_steps import PAGE_SIZE, pages_for, step_batch, step_plan
from gpu_timing import Ceilings, Timer, capture
from neuron import kernels
from neuron.engine.batch import StepContext
from neuron.engine.kv_cache import KVLayout, PagedKV
from neuron.engine.runner import ModelRunner
from neuron.layers.attention import make_attention_backend
from neuron.models.decoder import CausalLM
from neuron.models.registry import build_model
from neuron.weights.loader import load_dummy_weights, load_weights
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
    """What is measured: decode at (batch, context) and prompts of these lengths; new_tokens: of the peer's generate."""

    decodes: tuple[tuple[int, int], ...]
    prompts: tuple[int, ...]
    new_tokens: int


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


class Ours:
    """Our model, cache and runner, as the engine has them."""

    def __init__(self, config: dict[str, Any], device: torch.device, dtype: torch.dtype, plan: Plan) -> None:
        self.config = config
        self.device = device
        self.model: CausalLM = build_model(config, device=device, dtype=dtype)
        load_dummy_weights(self.model, seed=0)
        longest = max(context for _, context in (*plan.decodes, *((1, prompt) for prompt in plan.prompts)))
        num_pages = max(
            pages_for(batch, context) for batch, context in (*plan.decodes, *((1, prompt) for prompt in plan.prompts))
        )
        shape = self.model.config
        layout = KVLayout(shape.num_layers, shape.num_kv_heads_local, shape.head_dim, PAGE_SIZE, dtype)
        self.kv = PagedKV(layout, num_pages, device)
        for index in range(shape.num_layers):
            self.kv.layer(index).normal_()
        self.attention = make_attention_backend(device)
        self.runner = ModelRunner(
            self.model,
            self.kv,
            self.attention,
            vocab_size=shape.vocab_size,
            max_step_tokens=max(*plan.prompts, max(batch for batch, _ in plan.decodes)),
            max_running=max(batch for batch, _ in plan.decodes),
            max_model_len=longest,
            device=device,
        )

    def step_seconds(self, timer: Timer, *, batch: int, context: int, query: int) -> float:
        """One step through the runner as it is today, host work and sampling included."""
        plan = step_plan(batch, context_len=context, query_len=query, vocab_size=self.config["vocab_size"])
        return statistics.median(timer.wall_seconds(lambda: self.runner.execute(plan)))

    @torch.inference_mode()
    def graph_seconds(self, timer: Timer, *, batch: int, context: int) -> float:
        """The decode step as one CUDA graph: planning of attention, model, head and sampling."""
        from neuron.kernels.sampling import sample

        step = step_batch(
            step_plan(batch, context_len=context, query_len=1, vocab_size=self.config["vocab_size"]), self.device
        )
        zeros = torch.zeros(batch, device=self.device)
        greedy = (zeros, zeros.int(), zeros + 1, zeros, zeros.long())

        def decode() -> None:
            hidden = self.model.forward(StepContext(step, self.kv, self.attention))
            sample(self.model.compute_logits(hidden), *greedy)

        replay = capture(decode, before=lambda: self.attention.prepare(step))
        return statistics.median(timer.rounds_of(replay))


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
    layout = KVLayout(shape.num_layers, shape.num_kv_heads_local, shape.head_dim, PAGE_SIZE, dtype)
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


def measure(
    name: str,
    config: dict[str, Any],
    timer: Timer,
    ceilings: Ceilings,
    plan: Plan,
    dtype: torch.dtype,
    *,
    with_graphs: bool,
    with_peer: bool,
    note: Callable[[str], None],
) -> tuple[list[Row], Peer | None]:
    """Rows of one model; the peer is kept for the compiled runs that follow while time is left."""
    device = timer.device
    rows: list[Row] = []
    ours = Ours(config, device, dtype, plan)
    cases = [("decode", batch, context, 1) for batch, context in plan.decodes]
    cases += [("prefill", 1, length, length) for length in plan.prompts]
    for kind, batch, context, query in cases:
        floor = floor_seconds(ceilings, config, batch=batch, context=context, query=query, itemsize=dtype.itemsize)
        row: Row = {"model": name, "case": kind, "batch": batch, "context": context, "floor_ms": floor * 1e3}
        row["runner_ms"] = ours.step_seconds(timer, batch=batch, context=context, query=query) * 1e3
        if kind == "decode" and with_graphs and kernels.is_available(device):
            row["graph_ms"] = ours.graph_seconds(timer, batch=batch, context=context) * 1e3
        rows.append(row)
        note(
            f"{name} {kind} {batch} x {context}: "
            + ", ".join(f"{k} {v:.3f}" for k, v in row.items() if k.endswith("_ms"))
        )
    del ours
    free()
    if not with_peer:
        return rows, None
    peer = Peer(config, device, dtype)
    for row in rows:
        if row["case"] == "prefill":
            row["peer_eager_ms"] = peer.prompt_seconds(timer, row["context"]) * 1e3
        else:
            row["peer_eager_ms"] = 1e3 * peer.decode_seconds(
                batch=row["batch"], context=row["context"], new_tokens=plan.new_tokens, static=False
            )
        free()
        note(f"{name} {row['case']} {row['batch']} x {row['context']}: transformers {row['peer_eager_ms']:.3f} ms")
    return rows, peer

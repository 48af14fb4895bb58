"""How many bytes a model takes, from its `config.json` and the headers of its weight files: nothing is loaded for it.

Five parts per rank: weights in the dtype they are loaded in, KV cache per token, activations of the largest step, CUDA
graphs of decode steps, and what an engine process takes before it has a model. The engine measures for itself when it
loads; tests hold this estimate to what it measures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from neuron.checkpoint.graph_memory import graph_bytes
from neuron.checkpoint.safetensors_header import TensorHeader
from neuron.checkpoint.weight_files import headers_of
from neuron.protocol import EngineConfig

_MIB = 2**20

_BYTES_OF_DTYPE = {"float32": 4, "bfloat16": 2, "float16": 2}

# What families assume where config.json does not say.
_DEFAULT_HEAD_DIM = {"qwen3": 128}

# Tensors that checkpoints carry and no engine reads.
_UNUSED_SUFFIXES = (".rotary_emb.inv_freq", ".attn.bias", ".masked_bias")
_UNUSED_PREFIXES = (
    "mtp.",
    "model.mtp.",
    "model.visual.",
    "visual.",
    "model.vision_tower.",
    "vision_tower.",
    "model.multi_modal_projector.",
    "multi_modal_projector.",
)

# An engine process on the CPU: interpreter, torch, its thread pools and a tokenizer.
_HOST_OVERHEAD_BYTES = 400 * _MIB
# On a device: CUDA context, cuBLAS workspaces, compiled kernels; a communicator of several ranks has buffers on top.
_DEVICE_OVERHEAD_BYTES = 1024 * _MIB
_COMMUNICATOR_BYTES = 512 * _MIB

# Contiguous copies of the pages of running decodes, on the CPU: up to half of the cache (engine/attention).
_HOST_CACHE_FACTOR = 1.5


class NotEstimable(Exception):
    """config.json does not say what is needed for an estimate; the engine will decide."""


class ModelShape(msgspec.Struct, frozen=True):
    """The figures of a decoder that its memory depends on. dtype: of the stored weights."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    dtype: str
    tie_word_embeddings: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelShape:
        """From a `config.json`, whose language model may be nested. Raises `NotEstimable`."""
        nested = config.get("text_config")
        hf = {**config, **nested} if isinstance(nested, Mapping) else config
        num_heads = _count(hf, "num_attention_heads")
        hidden_size = _count(hf, "hidden_size")
        head_dim = _DEFAULT_HEAD_DIM.get(str(hf.get("model_type")), hidden_size // num_heads)
        dtype = str(hf.get("dtype") or hf.get("torch_dtype") or "bfloat16").removeprefix("torch.")
        return cls(
            num_layers=_count(hf, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=_count(hf, "num_key_value_heads", num_heads),
            head_dim=_count(hf, "head_dim", head_dim),
            hidden_size=hidden_size,
            intermediate_size=_count(hf, "intermediate_size"),
            vocab_size=_count(hf, "vocab_size"),
            max_positions=_positions(hf),
            dtype=dtype if dtype in _BYTES_OF_DTYPE else "bfloat16",
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
        )


class StoredTensor(msgspec.Struct, frozen=True):
    """A tensor of a checkpoint, as its file's header describes it."""

    name: str
    num_elements: int
    is_matrix: bool


class Footprint(msgspec.Struct, frozen=True):
    """Bytes that one rank takes.

    second_copies: row blocks of the matrices, made on a CPU only where memory is plenty (engine/layers/row_blocks.py).
    cache_factor: bytes that a byte of KV cache takes in all.
    """

    weights: int
    kv_bytes_per_token: int
    activations: int
    overhead: int
    graphs: int = 0
    second_copies: int = 0
    cache_factor: float = 1.0

    @property
    def fixed(self) -> int:
        """All but the KV cache."""
        return self.weights + self.activations + self.graphs + self.overhead

    def cache_bytes(self, num_tokens: int) -> int:
        """What a cache for so many tokens takes."""
        return int(num_tokens * self.kv_bytes_per_token * self.cache_factor)

    def cache_tokens(self, num_bytes: int) -> int:
        """Tokens of the cache that so many bytes allow."""
        return max(0, int(num_bytes / (self.kv_bytes_per_token * self.cache_factor)))


def footprints(config: EngineConfig, shape: ModelShape, tensors: Iterable[StoredTensor]) -> list[Footprint]:
    """One per rank of the group that `config` describes."""
    is_host = not config.devices
    num_ranks = config.tensor_parallel_size
    item_bytes = _BYTES_OF_DTYPE[dtype_of(config, shape)]
    tensors = [tensor for tensor in tensors if _is_used(tensor.name, shape)]
    overhead = _HOST_OVERHEAD_BYTES if is_host else _DEVICE_OVERHEAD_BYTES
    if num_ranks > 1 and not is_host:
        overhead += _COMMUNICATOR_BYTES
    result = []
    for rank in range(num_ranks):
        share = _share(config.shares, rank, num_ranks)
        kv_heads = _kv_heads(shape, share, num_ranks)
        kv_share = kv_heads / shape.num_kv_heads
        matrices = others = 0
        for tensor in tensors:
            if not tensor.is_matrix:
                others += tensor.num_elements
            elif _is_of_keys_or_values(tensor.name):
                matrices += math.ceil(tensor.num_elements * kv_share)
            else:
                matrices += math.ceil(tensor.num_elements * share)
        result.append(
            Footprint(
                weights=(matrices + others) * item_bytes,
                kv_bytes_per_token=shape.num_layers * 2 * kv_heads * shape.head_dim * item_bytes,
                activations=_activations(config, shape, share, kv_heads, item_bytes),
                overhead=overhead,
                graphs=_graphs(config, shape, share, kv_heads, item_bytes),
                second_copies=matrices * item_bytes if is_host and item_bytes == 4 else 0,
                cache_factor=_HOST_CACHE_FACTOR if is_host else 1.0,
            )
        )
    return result


def dtype_of(config: EngineConfig, shape: ModelShape) -> str:
    """As what the weights are loaded: `auto` is float32 on a CPU and the checkpoint's own dtype on a device."""
    if config.dtype != "auto":
        return config.dtype
    return shape.dtype if config.devices else "float32"


def stored_tensors(files: Iterable[Path]) -> list[StoredTensor]:
    """The tensors of safetensors files, from their headers. Raises `OSError`, `CheckpointError`."""
    return [stored(tensor) for file in files for _, found in headers_of(file.parent, [file.name]) for tensor in found]


def stored(tensor: TensorHeader) -> StoredTensor:
    """What an estimate needs to know of a tensor."""
    return StoredTensor(tensor.name, tensor.num_elements, is_matrix=len(tensor.shape) > 1)


def summarised(tensors: Iterable[StoredTensor], shape: ModelShape) -> list[StoredTensor]:
    """A few tensors that take what these take, for whoever passes them on: those that are read, by how they are cut."""
    sums: dict[StoredTensor, int] = {}
    for tensor in tensors:
        if _is_used(tensor.name, shape):
            kind = _OTHERS
            if tensor.is_matrix:
                kind = _KEYS_AND_VALUES if _is_of_keys_or_values(tensor.name) else _MATRICES
            sums[kind] = sums.get(kind, 0) + tensor.num_elements
    return [msgspec.structs.replace(kind, num_elements=total) for kind, total in sums.items()]


def tensors_of_size(num_bytes: int, shape: ModelShape) -> list[StoredTensor]:
    """A stand-in where only the size of the weight files is known, before they are downloaded."""
    embedding = shape.vocab_size * shape.hidden_size
    num_elements = num_bytes // _BYTES_OF_DTYPE[shape.dtype]
    if num_elements <= embedding:
        return [StoredTensor("model.layers", num_elements, is_matrix=True)]
    return [
        StoredTensor("model.embed_tokens.weight", embedding, is_matrix=True),
        StoredTensor("model.layers", num_elements - embedding, is_matrix=True),
    ]


_MATRICES = StoredTensor("model.layers.weight", 0, is_matrix=True)
_KEYS_AND_VALUES = StoredTensor("model.layers.self_attn.k_proj.weight", 0, is_matrix=True)
_OTHERS = StoredTensor("model.norm.weight", 0, is_matrix=False)


def _is_of_keys_or_values(name: str) -> bool:
    return ".k_proj." in name or ".v_proj." in name


def _is_used(name: str, shape: ModelShape) -> bool:
    if name.endswith(_UNUSED_SUFFIXES) or name.startswith(_UNUSED_PREFIXES):
        return False
    return not (shape.tie_word_embeddings and name.endswith("lm_head.weight"))


def _share(shares: Sequence[int], rank: int, num_ranks: int) -> float:
    """The part of what is divided that a rank holds."""
    return shares[rank] / sum(shares) if shares else 1 / num_ranks


def _kv_heads(shape: ModelShape, share: float, num_ranks: int) -> int:
    """KV heads of a rank: replicated when there are fewer than ranks; of an uneven part, rounded up."""
    return 1 if shape.num_kv_heads < num_ranks else math.ceil(shape.num_kv_heads * share - 1e-9)


def _activations(config: EngineConfig, shape: ModelShape, share: float, kv_heads: int, item_bytes: int) -> int:
    """Of the largest step: `max_step_tokens` tokens, and logits for as many rows as sequences may run.

    Alive at once are hidden states (residual, norm, projection, sum, some of them beside a float32 copy) and twice the
    widest intermediate of a block; of logits a gathered and a cut copy and the float32 one.
    """
    bytes_per_token = _bytes_per_token(shape, share, kv_heads, item_bytes)
    bytes_per_row = shape.vocab_size * (2 * item_bytes + 4)
    num_rows = min(config.max_running, config.max_step_tokens)
    return config.max_step_tokens * bytes_per_token + num_rows * bytes_per_row


def _bytes_per_token(shape: ModelShape, share: float, kv_heads: int, item_bytes: int) -> int:
    heads = math.ceil(shape.num_heads * share) + 2 * kv_heads
    inner = math.ceil(shape.intermediate_size * share)
    widest = 3 * max(inner, heads * shape.head_dim)
    return (6 * shape.hidden_size + 2 * widest) * max(item_bytes, 2)


def _graphs(config: EngineConfig, shape: ModelShape, share: float, kv_heads: int, item_bytes: int) -> int:
    """What the engine sets aside for recorded decode steps; none on a CPU."""
    if not config.devices or not config.cuda_graphs:
        return 0
    return graph_bytes(
        max_running=min(config.max_running, config.max_step_tokens),
        num_layers=shape.num_layers,
        num_heads=math.ceil(shape.num_heads * share),
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        bytes_per_token=_bytes_per_token(shape, share, kv_heads, item_bytes),
        item_bytes=item_bytes,
    )


def _positions(hf: Mapping[str, Any]) -> int:
    """Positions that the checkpoint was made for; with yarn, after stretching."""
    positions = _count(hf, "max_position_embeddings", 2048)
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(rope, Mapping) or (rope.get("rope_type") or rope.get("type")) != "yarn":
        return positions
    original = rope.get("original_max_position_embeddings") or hf.get("original_max_position_embeddings") or positions
    factor = rope.get("factor") or positions / original
    return max(positions, int(factor * original))


def _count(hf: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = hf.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise NotEstimable(f"{key} is {value!r}")
    return value

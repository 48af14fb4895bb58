"""Bytes that a model takes, from its `config.json` and the headers of its weight files: nothing is loaded for it.

Five parts per rank: weights in the dtype they are loaded in, KV cache per token, activations of the largest step, CUDA
graphs of decode steps, and what an engine process takes before it has a model. The engine measures for itself when it
loads; tests hold this estimate to what it measures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import msgspec

from neuron.checkpoint.block_types import BLOCK_TYPES, NATIVE_BITS
from neuron.checkpoint.config import DTYPES, ModelConfig
from neuron.checkpoint.safetensors_header import BITS, CONVERTED, TensorHeader
from neuron.checkpoint.sharding import Rank, ranks_of, shard_columns, shard_heads
from neuron.checkpoint.tensor_names import Role, is_unread, role_of
from neuron.checkpoint.weight_files import headers_of
from neuron.host_memory import multiplies_bfloat16
from neuron.native_kernels import has_native_kernels
from neuron.protocol import CacheGroup, EngineConfig

_MIB = 2**20

# An engine process on the CPU: interpreter, torch, its thread pools and a tokenizer.
_HOST_OVERHEAD_BYTES = 400 * _MIB
# On a device: CUDA context, cuBLAS workspaces, compiled kernels; a communicator of several ranks has buffers on top.
_DEVICE_OVERHEAD_BYTES = 1024 * _MIB
_COMMUNICATOR_BYTES = 512 * _MIB

# Contiguous copies of the pages of running decodes, on the CPU: up to half of the cache (engine/attention). The native
# kernels read pages where they lie.
_HOST_CACHE_FACTOR = 1.5


class StoredTensor(msgspec.Struct, frozen=True):
    """A tensor of a checkpoint, as its file's header describes it.

    bits: of an element, where it is held as it is stored (codes, scales); None where it becomes the model's dtype.
    native_bits: of an element, where the native CPU kernels keep a matrix as it is stored; None where nobody can.
    """

    name: str
    num_elements: int
    is_matrix: bool
    bits: int | None = None
    native_bits: float | None = None

    @property
    def role(self) -> Role:
        return role_of(self.name, is_matrix=self.is_matrix)

    def bytes_of(self, part: float, item_bytes: int, *, keeps_matrices: bool = False) -> int:
        """That a part of it takes in a model whose elements have `item_bytes`. keeps_matrices: the native CPU kernels
        multiply."""
        num_elements = math.ceil(self.num_elements * part)
        if self.bits is not None:
            return math.ceil(num_elements * self.bits / 8)
        if keeps_matrices and self.is_matrix and self.native_bits is not None:
            return math.ceil(num_elements * self.native_bits / 8)
        return num_elements * item_bytes


class Footprint(msgspec.Struct, frozen=True):
    """Bytes that one rank takes.

    weights: of them `experts` are those of experts.
    second_copies: row blocks of the matrices, made on a CPU without native kernels, and only where memory is plenty
    (engine/gemm/row_blocks.py).
    cache_factor: bytes that a byte of KV cache takes in all.
    """

    weights: int
    kv_bytes_per_token: int
    activations: int
    overhead: int
    graphs: int = 0
    second_copies: int = 0
    cache_factor: float = 1.0
    experts: int = 0

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


def footprints(config: EngineConfig, model: ModelConfig, tensors: Iterable[StoredTensor]) -> list[Footprint]:
    """One per rank of the group that `config` describes. Raises `UnsupportedSharding`."""
    is_host = not config.devices
    world_size = config.tensor_parallel_size
    item_bytes = DTYPES[dtype_of(config, model)]
    tensors = [tensor for tensor in tensors if _is_used(tensor.name, model)]
    native = uses_native_kernels(config, model)
    reads_in_place = native and item_bytes == 4
    overhead = _HOST_OVERHEAD_BYTES if is_host else _DEVICE_OVERHEAD_BYTES
    if world_size > 1 and not is_host:
        overhead += _COMMUNICATOR_BYTES
    result = []
    for rank in ranks_of(world_size, config.shares):
        part = rank_sizes(model, rank)
        share = _share(rank)
        parts = {
            "matrix": share,
            "experts": share,
            "keys_and_values": part.num_kv_heads / model.num_kv_heads,
            "replicated": 1.0,
        }
        held = dict.fromkeys(parts, 0)
        copied = 0
        for tensor in tensors:
            num_bytes = tensor.bytes_of(parts[tensor.role], item_bytes, keeps_matrices=native)
            held[tensor.role] += num_bytes
            if tensor.is_matrix and tensor.bits is None:
                copied += num_bytes
        result.append(
            Footprint(
                weights=sum(held.values()),
                experts=held["experts"],
                kv_bytes_per_token=sum(group.bytes_per_token for group in cache_groups(model, part, item_bytes)),
                activations=_activations(config, part, item_bytes),
                overhead=overhead,
                graphs=_graphs(config, part, item_bytes),
                second_copies=copied if is_host and item_bytes == 4 and not native else 0,
                cache_factor=_HOST_CACHE_FACTOR if is_host and not reads_in_place else 1.0,
            )
        )
    return result


def dtype_of(config: EngineConfig, model: ModelConfig) -> str:
    """As what the weights are loaded. `auto` is the checkpoint's own dtype on a device; on a CPU it is float32, unless
    the checkpoint is of bfloat16 and the processor multiplies that faster."""
    if config.dtype != "auto":
        return config.dtype
    if config.devices:
        return model.dtype or "bfloat16"
    return "bfloat16" if model.dtype == "bfloat16" and multiplies_bfloat16() else "float32"


def uses_native_kernels(config: EngineConfig, model: ModelConfig) -> bool:
    """Whether the native CPU kernels multiply, for which matrices of 16 bits stay as they are stored. Where the
    processor has products of bfloat16, those of a bfloat16 model are the library's."""
    if config.devices or not has_native_kernels():
        return False
    return not (dtype_of(config, model) == "bfloat16" and multiplies_bfloat16())


def stored_tensors(files: Iterable[Path]) -> list[StoredTensor]:
    """The tensors of safetensors files, from their headers. Raises `OSError`, `CheckpointError`."""
    return [stored(tensor) for file in files for _, found in headers_of(file.parent, [file.name]) for tensor in found]


def stored(tensor: TensorHeader) -> StoredTensor:
    """What an estimate needs to know of a tensor."""
    is_converted = tensor.dtype in CONVERTED or tensor.dtype in BLOCK_TYPES
    bits = None if is_converted else BITS[tensor.dtype]
    native_bits = NATIVE_BITS.get(tensor.dtype, 16 if tensor.dtype in ("BF16", "F16") else None)
    return StoredTensor(
        tensor.name, tensor.num_elements, is_matrix=len(tensor.shape) > 1, bits=bits, native_bits=native_bits
    )


def summarised(tensors: Iterable[StoredTensor], model: ModelConfig) -> list[StoredTensor]:
    """A few tensors that take what these take, for whoever passes them on: those that are read, by how they are cut."""
    sums: dict[tuple[Role, int | None, float | None], int] = {}
    for tensor in tensors:
        if _is_used(tensor.name, model):
            kind = tensor.role, tensor.bits, tensor.native_bits
            sums[kind] = sums.get(kind, 0) + tensor.num_elements
    return [
        msgspec.structs.replace(_SUMS[role], num_elements=total, bits=bits, native_bits=native_bits)
        for (role, bits, native_bits), total in sums.items()
    ]


def tensors_of_size(num_bytes: int, model: ModelConfig) -> list[StoredTensor]:
    """A stand-in where only the size of the weight files is known, before they are downloaded."""
    embedding = model.vocab_size * model.hidden_size
    item_bytes = DTYPES[model.dtype or "bfloat16"]
    num_elements = num_bytes // item_bytes
    bits = 16 if item_bytes == 2 else None
    if num_elements <= embedding:
        return [StoredTensor("model.layers", num_elements, is_matrix=True, native_bits=bits)]
    return [
        StoredTensor("model.embed_tokens.weight", embedding, is_matrix=True, native_bits=bits),
        StoredTensor("model.layers", num_elements - embedding, is_matrix=True, native_bits=bits),
    ]


_SUMS: dict[Role, StoredTensor] = {
    "matrix": StoredTensor("model.layers.weight", 0, is_matrix=True),
    "keys_and_values": StoredTensor("model.layers.self_attn.k_proj.weight", 0, is_matrix=True),
    "experts": StoredTensor("model.layers.mlp.experts.weight", 0, is_matrix=True),
    "replicated": StoredTensor("model.norm.weight", 0, is_matrix=False),
}


def _is_used(name: str, model: ModelConfig) -> bool:
    return not is_unread(name) and not (model.tie_word_embeddings and name.endswith("lm_head.weight"))


def _share(rank: Rank) -> float:
    """The part of what is divided that a rank holds."""
    return rank.shares[rank.rank] / sum(rank.shares) if rank.shares else 1 / rank.world_size


class RankSizes(msgspec.Struct, frozen=True):
    """What one rank holds of a model: its heads and the columns of its feed-forward block; the rest is the model's."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int


def rank_sizes(model: ModelConfig, rank: Rank) -> RankSizes:
    """Raises `UnsupportedSharding`."""
    query, kv = shard_heads(model.num_heads, model.num_kv_heads, rank)
    inner = shard_columns(model.intermediate_size, rank, what="columns of its feed-forward block")
    return RankSizes(
        num_layers=model.num_layers,
        num_heads=query.length,
        num_kv_heads=kv.length,
        head_dim=model.head_dim,
        hidden_size=model.hidden_size,
        intermediate_size=inner.length,
        vocab_size=model.vocab_size,
    )


def cache_groups(model: ModelConfig, rank: RankSizes, item_bytes: int) -> tuple[CacheGroup, ...]:
    """What a rank keeps of each token, layers of one kind together: those that see all positions, and those of each
    window."""
    layers: dict[int | None, list[int]] = {}
    for layer, window in enumerate(model.sliding_windows):
        layers.setdefault(window, []).append(layer)
    return tuple(
        CacheGroup(tuple(numbers), rank.num_kv_heads, rank.head_dim, item_bytes, window)
        for window, numbers in layers.items()
    )


def activation_bytes_per_token(rank: RankSizes, item_bytes: int) -> int:
    """Of a token of a step, an upper estimate.

    Alive at once are hidden states (residual, norm, projection, sum, some of them beside a float32 copy) and twice the
    widest intermediate of a block.
    """
    heads = rank.num_heads + 2 * rank.num_kv_heads
    widest = 3 * max(rank.intermediate_size, heads * rank.head_dim)
    return (6 * rank.hidden_size + 2 * widest) * max(item_bytes, 2)


def logit_bytes_per_row(rank: RankSizes, item_bytes: int) -> int:
    """Of a row whose logits are computed: gathered, cut, and as float32."""
    return rank.vocab_size * (2 * item_bytes + 4)


def _activations(config: EngineConfig, rank: RankSizes, item_bytes: int) -> int:
    """Of the largest step: `max_step_tokens` tokens, and logits for as many rows as sequences may run."""
    num_rows = min(config.max_running, config.max_step_tokens)
    tokens = config.max_step_tokens * activation_bytes_per_token(rank, item_bytes)
    return tokens + num_rows * logit_bytes_per_row(rank, item_bytes)


def _graphs(config: EngineConfig, rank: RankSizes, item_bytes: int) -> int:
    """What the engine sets aside for recorded decode steps; none on a CPU."""
    if not config.devices or not config.cuda_graphs:
        return 0
    return graph_bytes(rank, item_bytes, max_running=min(config.max_running, config.max_step_tokens))


# Rows of the decode steps that are recorded, each with and without sampling.
GRAPH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_NUM_GRAPHS = 2 * len(GRAPH_SIZES)
# Attention cuts a context into at most so many segments in decode steps (engine/kernels/attention/tiling.py).
_MAX_SEGMENTS = 32
# Per row of the sampling kernel: candidates, maxima of groups, figures of tiles.
_SAMPLING_BYTES = 40 * 1024
# Launches of a decoder layer, and around the layers.
_LAUNCHES_PER_LAYER = 10
_OTHER_LAUNCHES = 40
_BYTES_PER_LAUNCH = 10 * 1024


def graph_bytes(rank: RankSizes, item_bytes: int, *, max_running: int) -> int:
    """Device memory of the recordings of decode steps (CUDA graphs) of one rank: an upper estimate.

    The graphs share one pool as large as their largest step needs: activations and logits of that many rows,
    attention's partial results for the most segments a context is cut into, the sampling kernel's lists. Beside it
    there is one place for logits that are sampled outside of a graph, and what the driver keeps for each recorded
    launch. That last figure is an assumption (the driver does not tell); all others follow from what is allocated.
    """
    rows = min(max_running, GRAPH_SIZES[-1])
    partial = _MAX_SEGMENTS * rank.num_heads * ((1 << (rank.head_dim - 1).bit_length()) + 2) * 4
    logits = rank.vocab_size * (2 * item_bytes + 4 + 4)
    launches = _NUM_GRAPHS * (rank.num_layers * _LAUNCHES_PER_LAYER + _OTHER_LAUNCHES)
    bytes_per_row = activation_bytes_per_token(rank, item_bytes) + partial + logits + _SAMPLING_BYTES
    return rows * bytes_per_row + launches * _BYTES_PER_LAUNCH

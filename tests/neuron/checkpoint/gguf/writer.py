"""GGUF files as their writers make them, and damaged in ways that theirs are not."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from neuron.checkpoint.block_types import BLOCK_TYPES

_KINDS = {"u8": 0, "u16": 2, "u32": 4, "i32": 5, "f32": 6, "bool": 7, "string": 8, "array": 9, "u64": 10}
_FORMS = {"u8": "<B", "u16": "<H", "u32": "<I", "i32": "<i", "f32": "<f", "bool": "<?", "u64": "<Q"}

Tensors = Mapping[str, tuple[str, Sequence[int], bytes]]
"""By the file's names: type, shape as torch has it, data."""


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def typed(value: Any) -> bytes:
    """A value behind the number of its type. Whole numbers are u32, lists are of the type of their first element."""
    kind, value = value if isinstance(value, tuple) else (_kind_of(value), value)
    return struct.pack("<I", _KINDS[kind]) + _plain(kind, value)


def _kind_of(value: Any) -> str:
    return {bool: "bool", int: "u32", float: "f32", str: "string", bytes: "string", list: "array"}[type(value)]


def _plain(kind: str, value: Any) -> bytes:
    if kind == "string":
        return text(value)
    if kind == "array":
        inner = _kind_of(value[0]) if value else "u32"
        head = struct.pack("<IQ", _KINDS[inner], len(value))
        return head + b"".join(_plain(inner, each) for each in value)
    return struct.pack(_FORMS[kind], value)


def header_of(metadata: Mapping[str, Any], tensors: Tensors, *, version: int = 3, alignment: int = 32) -> bytes:
    parts = [b"GGUF", struct.pack("<IQQ", version, len(tensors), len(metadata))]
    parts += [text(key) + typed(value) for key, value in metadata.items()]
    offset = 0
    for name, (kind, shape, data) in tensors.items():
        sizes = b"".join(struct.pack("<Q", size) for size in reversed(shape))
        number = BLOCK_TYPES[kind].number
        parts.append(text(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", number, offset))
        offset += -(-len(data) // alignment) * alignment
    return b"".join(parts)


def gguf_bytes(metadata: Mapping[str, Any], tensors: Tensors, *, version: int = 3, alignment: int = 32) -> bytes:
    found = bytearray(header_of(metadata, tensors, version=version, alignment=alignment))
    for _, _, data in tensors.values():
        found += bytes(-len(found) % alignment) + data
    return bytes(found + bytes(-len(found) % alignment))


def write(path: Path, metadata: Mapping[str, Any], tensors: Tensors, **options: int) -> Path:
    path.write_bytes(gguf_bytes(metadata, tensors, **options))
    return path


def model_metadata(architecture: str = "llama", vocab: int = 96, **changes: Any) -> dict[str, Any]:
    """Of a small model: two layers, four heads and two of keys, 64 wide."""
    values: dict[str, Any] = {
        "block_count": 2,
        "embedding_length": 64,
        "feed_forward_length": 128,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "context_length": 256,
        "rope.freq_base": 10_000.0,
        "rope.dimension_count": 16,
    } | {key.replace("__", "."): value for key, value in changes.items()}
    metadata = {f"{architecture}.{key}": value for key, value in values.items() if value is not None}
    tokens = [f"t{index}" for index in range(vocab)]
    return {"general.architecture": architecture, **metadata, "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.eos_token_id": 2}  # fmt: skip

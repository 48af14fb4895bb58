"""A GGUF checkpoint: its files together, as what a folder with a `config.json` and safetensors would say.

Tensors bear the names of the original checkpoint, so that everything behind this border sees one kind of checkpoint.
"""

from __future__ import annotations

import array
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from neuron.checkpoint.errors import CheckpointError
from neuron.checkpoint.files import open_file
from neuron.checkpoint.gguf.files import splits_of
from neuron.checkpoint.gguf.header import GgufHeader, Value, read_header
from neuron.checkpoint.gguf.model_config import config_of
from neuron.checkpoint.gguf.tensor_names import ROPE_DIVISORS, is_interleaved, original_name
from neuron.checkpoint.safetensors_header import TensorHeader

# `general.file_type`: how most of a file's matrices are stored (`llama_ftype` of llama.cpp). One bit says that whoever
# wrote the file did not know either.
_FILE_TYPES: Mapping[int, str] = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 38: "MXFP4_MOE", 39: "NVFP4",
}  # fmt: skip
_FLOATS = frozenset(("F32", "F16", "BF16", "F64"))
_MAX_DIVISORS = 4_096


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor under its original name. file: in which it lies; dtype of `header`: the block type's name.

    interleaved_heads: of how many heads its rows are, where they lie as pairs (`tensor_names.is_interleaved`), else 0.
    """

    file: str
    header: TensorHeader
    interleaved_heads: int = 0


@dataclass(frozen=True, slots=True)
class GgufCheckpoint:
    """files: names in the folder, splits in their order. config: as a `config.json` would have it. metadata: that of
    the first file. quantization: how most of it is stored, as its makers call it (`Q4_K_M`)."""

    files: tuple[str, ...]
    config: dict[str, Any]
    tensors: dict[str, GgufTensor]
    metadata: Mapping[str, Value]
    quantization: str


@contextmanager
def opened(path: Path) -> Iterator[dict[str, int]]:
    """The files of the checkpoint that `path` is (the first split of), by name: descriptors for as long as it lasts.

    Raises `CheckpointError`, `OSError`.
    """
    descriptors: dict[str, int] = {}
    try:
        for name in splits_of(path.name):
            descriptors[name] = open_file(path.with_name(name))
        yield descriptors
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def read_checkpoint(path: Path, descriptors: Mapping[str, int]) -> GgufCheckpoint:
    """What the headers of a checkpoint's files say together.

    path: of its file, or of its first split; descriptors: of all of its files, by name. Raises `CheckpointError`, which
    names file and field; `NotSupported`; `OSError`.
    """
    files = splits_of(path.name)
    headers = [read_header(descriptors[name], name) for name in files]
    _check_splits(headers)
    first = headers[0]
    found: dict[str, tuple[str, TensorHeader]] = {}
    for header in headers:
        for tensor in header.tensors:
            if tensor.name in found:
                raise CheckpointError(
                    f"two files hold the same tensor ({found[tensor.name][0]} and {header.file})",
                    file=header.file,
                    tensors=[tensor.name],
                )
            found[tensor.name] = header.file, tensor
    names = list(found)
    divisors = found.pop(ROPE_DIVISORS, None)
    config = config_of(
        first.metadata,
        file=first.file,
        names=names,
        rope_divisors=None if divisors is None else _numbers(descriptors[divisors[0]], *divisors),
        dtype="bfloat16" if _most_bytes(found) == "BF16" else None,
    )
    architecture = str(first.metadata["general.architecture"])
    return GgufCheckpoint(
        files, config, _renamed(found, architecture, config), first.metadata, _quantization(first, found)
    )


def _check_splits(headers: Sequence[GgufHeader]) -> None:
    """That the files are the splits that they say they are, all of them and in their order."""
    first = headers[0]
    count = first.metadata.get("split.count", 1) or 1
    if count != len(headers):
        raise CheckpointError(
            f"{first.file}: split.count is {str(count)[:40]}, and its name says {len(headers)}", file=first.file
        )
    if len(headers) == 1:
        return
    for number, header in enumerate(headers):
        for key, expected in (("split.no", number), ("split.count", count)):
            if header.metadata.get(key) != expected:
                raise CheckpointError(
                    f"{header.file}: {key} is {str(header.metadata.get(key))[:40]} where its name says {expected}",
                    file=header.file,
                )
    total = first.metadata.get("split.tensors.count")
    there = sum(len(header.tensors) for header in headers)
    if total is not None and total != there:
        raise CheckpointError(
            f"{first.file}: split.tensors.count is {str(total)[:40]}, and the files hold {there}", file=first.file
        )


def _renamed(
    found: Mapping[str, tuple[str, TensorHeader]], architecture: str, config: Mapping[str, Any]
) -> dict[str, GgufTensor]:
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    tensors: dict[str, GgufTensor] = {}
    unknown = []
    for name, (file, header) in found.items():
        original = original_name(name)
        if original is None:
            unknown.append(name)
            continue
        interleaved = heads[name.split("attn_")[1][0]] if is_interleaved(architecture, name) else 0
        if interleaved and header.shape[0] % (2 * interleaved):
            raise CheckpointError(
                f"{file}: {header.shape[0]} rows do not divide among {interleaved} heads", file=file, tensors=[name]
            )
        tensors[original] = GgufTensor(file, msgspec.structs.replace(header, name=original), interleaved)
    if unknown:
        first = found[unknown[0]][0]
        raise CheckpointError(f"{first}: tensors that no {architecture} model has", file=first, tensors=unknown)
    return tensors


def _numbers(descriptor: int, file: str, tensor: TensorHeader) -> list[float]:
    """A small tensor of float32."""
    if tensor.dtype != "F32" or tensor.num_elements > _MAX_DIVISORS:
        raise CheckpointError(
            f"{file}: {tensor.num_elements} elements of {tensor.dtype}, and at most {_MAX_DIVISORS} of F32 are read",
            file=file,
            tensors=[tensor.name],
        )
    data = os.pread(descriptor, tensor.num_bytes, tensor.offset)
    if len(data) != tensor.num_bytes:
        raise CheckpointError(f"{file} is truncated: it became shorter while it was read", file=file)
    numbers = array.array("f", data)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()


def _most_bytes(found: Mapping[str, tuple[str, TensorHeader]]) -> str:
    """The type that most of the matrices are stored in, by their bytes."""
    sizes: Counter[str] = Counter()
    for _, tensor in found.values():
        if len(tensor.shape) > 1:
            sizes[tensor.dtype] += tensor.num_bytes
    return sizes.most_common(1)[0][0] if sizes else "F32"


def _quantization(header: GgufHeader, found: Mapping[str, tuple[str, TensorHeader]]) -> str:
    said = header.metadata.get("general.file_type")
    named = _FILE_TYPES.get(said) if type(said) is int else None
    types = {tensor.dtype for _, tensor in found.values()}
    # Writers that are no quantisers leave the field at what they copied it from.
    return named if named is not None and (named in _FLOATS) == (types <= _FLOATS) else _most_bytes(found)

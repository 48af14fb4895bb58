"""The safetensors files of a checkpoint, and the tensors in them: which are read, and that they fit together."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from neuron.checkpoint.errors import CheckpointError
from neuron.checkpoint.files import INDEX_FILE, SAFETENSORS, list_files, open_file, read_json
from neuron.checkpoint.safetensors_header import TensorHeader, read_header

SINGLE_FILE = "model.safetensors"
MAX_FILES = 1_000
"""Weight files that a checkpoint may be cut into."""
MAX_TENSORS = 1_000_000


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


def select(names: Collection[str], weight_map: Mapping[str, str] | None) -> tuple[str, ...]:
    """The files to read, of those that lie in a folder: those that the index names, else `model.safetensors`, else the
    only one there is. weight_map: file names by tensor, None without an index. Raises `CheckpointError`."""
    found = sorted(name for name in names if name.endswith(SAFETENSORS) and "/" not in name)
    if weight_map is not None:
        wanted = sorted(set(weight_map.values()))
        strange = [name for name in wanted if "/" in name or "\0" in name or not name.endswith(SAFETENSORS)]
        if strange:
            raise _in_index("names shards outside of its folder, or of another kind", strange)
        missing = sorted(set(wanted) - set(found))
        if missing:
            raise _in_index(f"names {len(missing)} files that do not exist", missing)
        if not wanted:
            raise _in_index("names no shards", ())
        found = wanted
    elif SINGLE_FILE in found:
        return (SINGLE_FILE,)
    elif not found:
        raise CheckpointError("no safetensors file (other weight formats are not supported)")
    elif len(found) > 1:
        raise CheckpointError(
            f"several safetensors files but no {INDEX_FILE}, which would say what belongs together", tensors=found
        )
    if len(found) > MAX_FILES:
        raise CheckpointError(f"{len(found)} weight files, and at most {MAX_FILES} are read")
    return tuple(found)


def read_index(folder: Path) -> dict[str, str] | None:
    """File names by tensor, None where the folder has no index. Raises `CheckpointError`, `OSError`."""
    if not os.path.lexists(folder / INDEX_FILE):
        return None
    index: _Index = read_json(folder / INDEX_FILE, type=_Index)
    return index.weight_map


def files_of(folder: Path) -> tuple[tuple[str, ...], dict[str, str] | None]:
    """The files to read of a folder, and what its index promises of them. Raises `CheckpointError`, `OSError`."""
    weight_map = read_index(folder)
    return select(list_files(folder), weight_map), weight_map


def headers_of(folder: Path, files: Sequence[str]) -> Iterator[tuple[str, list[TensorHeader]]]:
    """Each file with its tensors, one file open at a time. Raises `CheckpointError`, `OSError`."""
    for name in files:
        descriptor = open_file(folder / name)
        try:
            tensors = read_header(descriptor, name)
        finally:
            os.close(descriptor)
        yield name, tensors


def merge(
    headers: Iterable[tuple[str, list[TensorHeader]]], weight_map: Mapping[str, str] | None
) -> dict[str, tuple[str, TensorHeader]]:
    """Every tensor with the file it lies in, each once, and all that the index promises. Raises `CheckpointError`."""
    tensors: dict[str, tuple[str, TensorHeader]] = {}
    for file, found in headers:
        for tensor in found:
            if tensor.name in tensors:
                first = tensors[tensor.name][0]
                raise CheckpointError(
                    f"two files hold the same tensor ({first} and {file})", file=file, tensors=[tensor.name]
                )
            tensors[tensor.name] = file, tensor
        if len(tensors) > MAX_TENSORS:
            raise CheckpointError(f"{len(tensors)} tensors, and at most {MAX_TENSORS} are read", file=file)
    absent = sorted(weight_map.keys() - tensors.keys()) if weight_map else []
    if absent:
        raise _in_index("names tensors that no shard holds", absent)
    return tensors


def _in_index(what: str, names: Sequence[str]) -> CheckpointError:
    return CheckpointError(f"{INDEX_FILE} {what}", file=INDEX_FILE, tensors=names)

"""A safetensors checkpoint folder: what is in it and where, checked before anything is read.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from neuron.models.errors import BadCheckpoint

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100 * 2**20

# safetensors dtype -> torch dtype, those that a float model's weights come in.
_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint, from its file's header. offset: of its data from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    num_bytes: int


class CheckpointReader:
    """The tensors of a checkpoint folder and the open files they lie in. Opening reads and verifies headers only.

    Takes `model.safetensors.index.json` with its shards, `model.safetensors`, or the only `*.safetensors` there is.
    opened: descriptors, by file name, to be read instead of the files of that name (copies in memory); they are
    closed with the others. What happens to the folder after the opening no longer matters, unless a file is cut short.
    A context manager. Raises `BadCheckpoint`.
    """

    def __init__(self, path: Path, *, opened: Mapping[str, int] | None = None) -> None:
        self._descriptors: dict[Path, int] = {path / name: number for name, number in (opened or {}).items()}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            files, expected = _list_files(path)
            for file in files:
                for info in read_header(file, self._open(file)):
                    if info.name in self.tensors:
                        raise BadCheckpoint(f"two files of {path} hold the same tensor", tensors=[info.name])
                    self.tensors[info.name] = info
            absent = sorted(expected - self.tensors.keys())
            if absent:
                raise BadCheckpoint("the index names tensors that no shard holds", tensors=absent)
        except BaseException:
            self.close()
            raise

    @property
    def total_bytes(self) -> int:
        """Size of all tensors together."""
        return sum(info.num_bytes for info in self.tensors.values())

    def descriptor(self, file: Path) -> int:
        """The open file, for positioned reads by any thread."""
        return self._descriptors[file]

    def dtype_of(self, info: TensorInfo) -> torch.dtype:
        """Raises `BadCheckpoint` if it is not a float's."""
        dtype = _DTYPES.get(info.dtype)
        if dtype is None:
            raise BadCheckpoint(f"dtype {info.dtype} is not supported for weights", tensors=[info.name])
        return dtype

    def close(self) -> None:
        """Close the files."""
        for number in self._descriptors.values():
            os.close(number)
        self._descriptors.clear()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, file: Path) -> int:
        if file not in self._descriptors:
            try:
                self._descriptors[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as exc:
                raise BadCheckpoint(f"{file.name} cannot be read: {exc}") from exc
        return self._descriptors[file]


def bytes_per_element(dtype: str) -> int:
    """Of a float dtype as safetensors names it."""
    return _DTYPES[dtype].itemsize


def _list_files(path: Path) -> tuple[list[Path], set[str]]:
    """The files to read, and the tensor names that the index promises (none without an index)."""
    index = path / _INDEX_FILE
    if index.is_file():
        try:
            weight_map = json.loads(index.read_bytes())["weight_map"]
            shards = sorted(set(weight_map.values()))
            strange = [shard for shard in shards if Path(shard).name != shard]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
            raise BadCheckpoint(f"{index} is not a safetensors index: {exc!r}") from exc
        if strange:
            raise BadCheckpoint(f"{index} names shards outside of its folder: {', '.join(strange)}")
        missing = [shard for shard in shards if not (path / shard).is_file()]
        if missing:
            raise BadCheckpoint(f"{path} lacks shards that its index names: {', '.join(missing)}")
        return [path / shard for shard in shards], set(weight_map)
    single = path / _SINGLE_FILE
    if single.is_file():
        return [single], set()
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found, set()
    if found:
        names = ", ".join(file.name for file in found)
        raise BadCheckpoint(f"{path} has several safetensors files ({names}) but no {_INDEX_FILE}")
    raise BadCheckpoint(f"{path} has no safetensors file (other weight formats are not supported)")


def read_header(file: Path, descriptor: int) -> list[TensorInfo]:
    """The tensors of one open file, in order of their data, checked against its size. Raises `BadCheckpoint`."""
    try:
        file_bytes = os.fstat(descriptor).st_size
        header_bytes = int.from_bytes(os.pread(descriptor, 8, 0), "little")
        if not 2 <= header_bytes <= min(_MAX_HEADER_BYTES, file_bytes - 8):
            raise BadCheckpoint(f"{file.name} is damaged: a header of {header_bytes} bytes in a file of {file_bytes}")
        header = json.loads(os.pread(descriptor, header_bytes, 8))
        data_start = 8 + header_bytes
        tensors = [
            TensorInfo(
                name=name,
                dtype=entry["dtype"],
                shape=tuple(entry["shape"]),
                file=file,
                offset=data_start + entry["data_offsets"][0],
                num_bytes=entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in header.items()
            if name != "__metadata__"
        ]
    except OSError as exc:
        raise BadCheckpoint(f"{file.name} cannot be read: {exc}") from exc
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as exc:
        raise BadCheckpoint(f"{file.name} is damaged: its header is not a safetensors header ({exc!r})") from exc
    for info in tensors:
        if info.offset < data_start or info.num_bytes < 0 or info.offset + info.num_bytes > file_bytes:
            raise BadCheckpoint(
                f"{file.name} is truncated: {file_bytes - data_start} bytes of data", tensors=[info.name]
            )
        if info.dtype in _DTYPES and info.num_bytes != math.prod(info.shape) * bytes_per_element(info.dtype):
            raise BadCheckpoint(f"{file.name} is damaged: size and shape disagree", tensors=[info.name])
    return sorted(tensors, key=lambda info: info.offset)

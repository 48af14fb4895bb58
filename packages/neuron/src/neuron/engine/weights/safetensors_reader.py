"""The weights of a checkpoint folder as the engine reads them: which there are, where they lie, and the open files.

The files, their headers and what they promise of each other are checked by `neuron.checkpoint`, as at preflight; here
they stay open to be read from.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from neuron.checkpoint.errors import CheckpointError
from neuron.checkpoint.files import open_file
from neuron.checkpoint.safetensors_header import TensorHeader, read_header
from neuron.checkpoint.weight_files import files_of, merge

# safetensors dtype -> torch dtype: floats, which become the model's, and what codes and scales are kept in.
_FLOATS: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_DTYPES: Mapping[str, torch.dtype] = {
    **_FLOATS,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint, from its file's header.

    dtype: as safetensors names it, or the name of a block type of GGUF. offset: of its data from the beginning of the
    file. interleaved_heads: its rows are so many heads, in each of which rows 0 and D/2 of the model are neighbours, 1
    and D/2 + 1, and so on; 0 where rows lie as the model has them.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    num_bytes: int
    interleaved_heads: int = 0


class OpenFiles:
    """The files that the tensors of a checkpoint lie in, open until it is closed. A context manager."""

    def __init__(self, descriptors: dict[Path, int]) -> None:
        self._descriptors = descriptors
        self.tensors: dict[str, TensorInfo] = {}

    def descriptor(self, file: Path) -> int:
        """The open file, for positioned reads by any thread."""
        return self._descriptors[file]

    def dtype_of(self, info: TensorInfo, *, stored: str | None = None) -> torch.dtype:
        """What a tensor's bytes are read as. Raises `CheckpointError` if it is not the type that it must be `stored`
        in, or none that weights may have."""
        raise NotImplementedError

    def close(self) -> None:
        """Close the files."""
        for number in self._descriptors.values():
            os.close(number)
        self._descriptors.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class CheckpointReader(OpenFiles):
    """The tensors of a checkpoint folder and the open files they lie in. Opening reads and verifies headers only.

    Takes `model.safetensors.index.json` with its shards, `model.safetensors`, or the only `*.safetensors` there is.
    opened: descriptors, by file name, to be read instead of the files of that name (copies in memory); they are
    closed with the others. What happens to the folder after the opening no longer matters, unless a file is cut short.
    A context manager. Raises `CheckpointError`.
    """

    def __init__(self, path: Path, *, opened: Mapping[str, int] | None = None) -> None:
        super().__init__({path / name: number for name, number in (opened or {}).items()})
        try:
            files, weight_map = files_of(path)
            for name, (file, tensor) in merge(self._headers(path, files), weight_map).items():
                self.tensors[name] = TensorInfo(
                    name, tensor.dtype, tensor.shape, path / file, tensor.offset, tensor.num_bytes
                )
        except CheckpointError as exc:
            self.close()
            raise CheckpointError(f"{path}: {exc.message}", file=exc.file, tensors=exc.tensors, is_named=True) from exc
        except OSError as exc:
            self.close()
            raise CheckpointError(f"{path} cannot be read: {exc}") from exc
        except BaseException:
            self.close()
            raise

    @property
    def total_bytes(self) -> int:
        """Size of all tensors together."""
        return sum(info.num_bytes for info in self.tensors.values())

    def dtype_of(self, info: TensorInfo, *, stored: str | None = None) -> torch.dtype:
        """Raises `CheckpointError` if it is not the one that it must be `stored` in; without one, if it is no float."""
        if stored is not None and info.dtype != stored:
            raise CheckpointError(f"dtype {info.dtype} where the format has {stored}", tensors=[info.name])
        dtype = (_FLOATS if stored is None else _DTYPES).get(info.dtype)
        if dtype is None:
            raise CheckpointError(f"dtype {info.dtype} is not supported for weights", tensors=[info.name])
        return dtype

    def _headers(self, path: Path, files: Sequence[str]) -> Iterator[tuple[str, list[TensorHeader]]]:
        for name in files:
            file = path / name
            if file not in self._descriptors:
                self._descriptors[file] = open_file(file)
            yield name, read_header(self._descriptors[file], name)


def bytes_per_element(dtype: str) -> int:
    """Of a dtype as safetensors names it, one that weights may have."""
    return _DTYPES[dtype].itemsize

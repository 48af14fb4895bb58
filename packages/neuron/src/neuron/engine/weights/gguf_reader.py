"""The weights of a GGUF checkpoint as the engine reads them, under the names of the original checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch

from neuron.checkpoint.errors import CheckpointError
from neuron.checkpoint.files import open_file
from neuron.checkpoint.gguf.checkpoint import read_checkpoint
from neuron.checkpoint.gguf.files import is_gguf_file, splits_of
from neuron.engine.quantization.gguf_blocks import is_decoded
from neuron.engine.weights.pieces import is_in_blocks
from neuron.engine.weights.safetensors_reader import CheckpointReader, TensorInfo

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Reader(Protocol):
    """The tensors of a checkpoint, and the open files that they lie in."""

    tensors: dict[str, TensorInfo]

    def descriptor(self, file: Path) -> int: ...

    def dtype_of(self, info: TensorInfo, *, stored: str | None = None) -> torch.dtype: ...

    def close(self) -> None: ...


class GgufReader:
    """As `CheckpointReader`, of a GGUF file or of its splits; `path` is the first of them. A context manager."""

    def __init__(self, path: Path, *, opened: Mapping[str, int] | None = None) -> None:
        self._descriptors: dict[Path, int] = {path.with_name(name): number for name, number in (opened or {}).items()}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            for name in splits_of(path.name):
                if path.with_name(name) not in self._descriptors:
                    self._descriptors[path.with_name(name)] = open_file(path.with_name(name))
            by_name = {file.name: number for file, number in self._descriptors.items()}
            for name, tensor in read_checkpoint(path, by_name).tensors.items():
                header = tensor.header
                self.tensors[name] = TensorInfo(
                    name,
                    header.dtype,
                    header.shape,
                    path.with_name(tensor.file),
                    header.offset,
                    header.num_bytes,
                    tensor.interleaved_heads,
                )
        except OSError as exc:
            self.close()
            raise CheckpointError(f"{path} cannot be read: {exc}") from exc
        except BaseException:
            self.close()
            raise

    def descriptor(self, file: Path) -> int:
        """The open file, for positioned reads by any thread."""
        return self._descriptors[file]

    def dtype_of(self, info: TensorInfo, *, stored: str | None = None) -> torch.dtype:
        """uint8 for blocks. Raises `CheckpointError` if it is not the type that it must be `stored` in, or one that is
        not read."""
        if stored is not None and info.dtype != stored:
            raise CheckpointError(f"type {info.dtype} where {stored} was expected", tensors=[info.name])
        if not is_decoded(info.dtype):
            raise CheckpointError(
                f"{info.file.name}: type {info.dtype} is not supported for weights yet",
                file=info.file.name,
                tensors=[info.name],
            )
        return torch.uint8 if is_in_blocks(info.dtype) else _FLOATS[info.dtype]

    def close(self) -> None:
        """Close the files."""
        for number in self._descriptors.values():
            os.close(number)
        self._descriptors.clear()

    def __enter__(self) -> GgufReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_checkpoint(path: Path, *, opened: Mapping[str, int] | None = None) -> CheckpointReader | GgufReader:
    """The reader of a folder, or of a GGUF file. Raises `CheckpointError`."""
    return GgufReader(path, opened=opened) if is_gguf_file(path) else CheckpointReader(path, opened=opened)

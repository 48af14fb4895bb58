"""The weights of a GGUF checkpoint as the engine reads them, under the names of the original checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from neuron.checkpoint.errors import CheckpointError
from neuron.checkpoint.files import open_file
from neuron.checkpoint.gguf.checkpoint import read_checkpoint
from neuron.checkpoint.gguf.files import is_gguf_file, splits_of
from neuron.engine.quantization.gguf_blocks import is_decoded
from neuron.engine.weights.pieces import is_in_blocks
from neuron.engine.weights.safetensors_reader import CheckpointReader, OpenFiles, TensorInfo

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class GgufReader(OpenFiles):
    """As `CheckpointReader`, of a GGUF file or of its splits; `path` is the first of them."""

    def __init__(self, path: Path, *, opened: Mapping[str, int] | None = None) -> None:
        super().__init__({path.with_name(name): number for name, number in (opened or {}).items()})
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


def open_checkpoint(path: Path, *, opened: Mapping[str, int] | None = None) -> OpenFiles:
    """The reader of a folder, or of a GGUF file. Raises `CheckpointError`."""
    return GgufReader(path, opened=opened) if is_gguf_file(path) else CheckpointReader(path, opened=opened)

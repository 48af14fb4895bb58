"""Filling a model from a checkpoint: plan, verify, then read each tensor's slice into its place."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from neuron.checkpoint.errors import CheckpointError
from neuron.checkpoint.tensor_names import canonical_name, is_unread
from neuron.engine.layers.embedding import VocabularyWeight
from neuron.engine.layers.linear import LinearLayer
from neuron.engine.models.decoder import CausalLM
from neuron.engine.weight_slices import Loadable, Slices, WeightSlice
from neuron.engine.weights.dummy import load_dummy_weights
from neuron.engine.weights.gguf_reader import open_checkpoint
from neuron.engine.weights.materialise import finish, materialise
from neuron.engine.weights.pieces import bytes_read, pieces_of
from neuron.engine.weights.pipeline import Piece, Transfer, make_transfer, num_reader_threads, transfer_pieces
from neuron.engine.weights.safetensors_reader import OpenFiles, TensorInfo

__all__ = ["Progress", "WeightsRead", "load_dummy_weights", "load_weights"]

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class _Read:
    """One slice of one tensor, and the parameter it goes to."""

    info: TensorInfo
    module: Loadable
    weight_slice: WeightSlice

    @property
    def num_bytes(self) -> int:
        return bytes_read(self.info, self.weight_slice)


@dataclass(frozen=True, slots=True)
class WeightsRead:
    """Of one rank: bytes of the checkpoint that it read, and seconds until they were in place."""

    num_bytes: int
    seconds: float


def load_weights(
    model: CausalLM,
    path: str | os.PathLike[str],
    *,
    opened: Mapping[str, int] | None = None,
    progress: Progress | None = None,
    transfer: Transfer | None = None,
    num_threads: int | None = None,
) -> WeightsRead:
    """Read this rank's part of the checkpoint in folder `path` into `model`, on its device and in its dtype.

    opened: descriptors by file name to be read in place of the files, and closed. progress(bytes_done, bytes_total)
    counts the bytes this rank reads; called before the first and after each piece of at most some megabytes.
    transfer, num_threads: how, where not as usual. Everything is verified against the file headers first. Raises
    `CheckpointError` naming the tensors that are missing, unexpected, of the wrong shape or unreadable, and
    `ModelError` (`out_of_memory`).
    """
    started = time.perf_counter()
    for descriptor in (opened or {}).values():
        os.set_inheritable(descriptor, False)  # they hold much memory, and no child of ours is to have them
    num_threads = num_threads or num_reader_threads(model.group.world_size)
    with open_checkpoint(Path(path), opened=opened) as reader:
        _hold_blocks(model, reader)
        reads = _plan(model, reader)
        _keep_stored_dtypes(reads)
        reads.sort(key=lambda read: (read.info.file, read.info.offset))
        bytes_total = sum(read.num_bytes for read in reads)
        bytes_done = 0

        def on_bytes(num_bytes: int) -> None:
            nonlocal bytes_done
            bytes_done += num_bytes
            if progress is not None:
                progress(bytes_done, bytes_total)

        on_bytes(0)
        with torch.inference_mode(False), torch.no_grad():
            for each in reads:
                materialise(model, each.module, each.weight_slice.parameter)
            transfer = transfer or make_transfer(model.device)  # its stream waits for what has zeroed them
            pieces = [piece for read in reads for piece in _pieces(model, reader, read, transfer.block_bytes)]
            transfer_pieces(pieces, transfer, num_threads=num_threads, on_bytes=on_bytes)
    read = WeightsRead(bytes_total, time.perf_counter() - started)
    logger.info(
        "weights read bytes=%d seconds=%.3f gb_per_s=%.2f threads=%d from=%s to=%s",
        read.num_bytes,
        read.seconds,
        read.num_bytes / read.seconds / 1e9,
        num_threads,
        "memory" if opened else "files",
        model.device,
    )
    finish(model)
    return read


def _pieces(model: CausalLM, reader: OpenFiles, read: _Read, block_bytes: int) -> Iterator[Piece]:
    info, weight_slice = read.info, read.weight_slice
    return pieces_of(
        info,
        weight_slice,
        materialise(model, read.module, weight_slice.parameter)[weight_slice.target],
        descriptor=reader.descriptor(info.file),
        dtype=reader.dtype_of(info, stored=weight_slice.stored),
        block_bytes=block_bytes,
    )


def _hold_blocks(model: CausalLM, reader: OpenFiles) -> None:
    """Layers that multiply with blocks as they are stored get that format, where all of their parts are in such."""
    available = {canonical_name(name): info for name, info in reader.tensors.items()}
    kinds: dict[int, dict[str | None, str]] = {}
    modules: dict[int, LinearLayer | VocabularyWeight] = {}
    for prefix, module, part in model.checkpoint_modules():
        if isinstance(module, LinearLayer | VocabularyWeight) and module.uses_native_kernels:
            info = available.get(f"{prefix}.weight")
            modules[id(module)] = module
            kinds.setdefault(id(module), {})[part] = "" if info is None else info.dtype
    for key, module in modules.items():
        if all(module.can_hold(kind) for kind in kinds[key].values()):
            module.hold_blocks(kinds[key])


def _plan(model: CausalLM, reader: OpenFiles) -> list[_Read]:
    """What to read where. Raises `CheckpointError` unless tensors and model fit exactly."""
    available = {canonical_name(name): info for name, info in reader.tensors.items()}
    if len(available) != len(reader.tensors):
        raise CheckpointError("the checkpoint holds its language model twice, under different prefixes")
    reads: list[_Read] = []
    missing: list[str] = []
    misshapen: list[str] = []
    for prefix, module, part in model.checkpoint_modules():
        for weight_slice in module.weight_slices(part):
            name = f"{prefix}.{weight_slice.suffix}"
            info = available.pop(name, None)
            if info is None:
                missing.append(name)
            elif info.shape != weight_slice.checkpoint_shape:
                misshapen.append(f"{name} {list(info.shape)} (expected {list(weight_slice.checkpoint_shape)})")
            elif _num_elements(weight_slice.source):
                reader.dtype_of(info, stored=weight_slice.stored)
                reads.append(_Read(info, module, weight_slice))
    if model.lm_head.is_tied:
        available.pop("lm_head.weight", None)  # some checkpoints store the tied matrix twice
    unexpected = sorted(name for name in available if not is_unread(name))
    if missing:
        raise CheckpointError("the checkpoint lacks tensors that the model needs", tensors=missing)
    if misshapen:
        raise CheckpointError("tensors have another shape than config.json says", tensors=misshapen)
    if unexpected:
        raise CheckpointError("the checkpoint holds tensors that the model does not know", tensors=unexpected)
    _verify_coverage(model, reads)
    return reads


def _keep_stored_dtypes(reads: list[_Read]) -> None:
    """Parameters of layers that multiply with them as they are stored get the dtype of their tensors, where that is one
    of 16 bits and the same for all parts."""
    found: dict[tuple[int, str], set[str]] = {}
    for read in reads:
        found.setdefault((id(read.module), read.weight_slice.parameter), set()).add(read.info.dtype)
    for read in reads:
        module, name = read.module, read.weight_slice.parameter
        if isinstance(module, LinearLayer | VocabularyWeight) and module.uses_native_kernels and name == "weight":
            (dtype, *others) = found[id(module), name]
            if not others and dtype in ("BF16", "F16"):
                stored = module.weight.to(_STORED[dtype])
                module.weight = nn.Parameter(stored, requires_grad=False)


_STORED = {"BF16": torch.bfloat16, "F16": torch.float16}


def _verify_coverage(model: CausalLM, reads: list[_Read]) -> None:
    """Every element of every parameter is written exactly once: the parts add up, and none overlap.

    A violation is an error in a family's name map, not in the checkpoint: RuntimeError.
    """
    owners = {id(module): name for name, module in model.named_modules()}
    targets: dict[tuple[int, str], list[Slices]] = {}
    for read in reads:
        targets.setdefault((id(read.module), read.weight_slice.parameter), []).append(read.weight_slice.target)
    for path, parameter in model.named_parameters():
        owner, _, name = path.rpartition(".")
        module = model.get_submodule(owner)
        slices = targets.pop((id(module), name), [])
        filled = sum(_num_elements(target) for target in slices)
        expected = parameter.numel() - int(getattr(module, "padding_elements", 0))
        if filled != expected or _overlap(slices):
            raise RuntimeError(f"the name map fills {filled} of {expected} elements of {path}")
    if targets:
        raise RuntimeError(f"the name map fills unknown parameters of {[owners[key[0]] for key in targets]}")


def _num_elements(slices: Slices) -> int:
    return math.prod(part.stop - part.start for part in slices)


def _overlap(targets: list[Slices]) -> bool:
    return any(
        all(a.start < b.stop and b.start < a.stop for a, b in zip(first, second, strict=True))
        for index, first in enumerate(targets)
        for second in targets[:index]
    )

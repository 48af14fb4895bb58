"""Filling a model from a checkpoint: plan, verify, then read each tensor's slice straight into its place."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from neuron.layers.placement import Loadable, Placement, Slices
from neuron.models.decoder import CausalLM
from neuron.models.errors import BadCheckpoint
from neuron.weights.dummy import load_dummy_weights
from neuron.weights.materialise import finish, materialise
from neuron.weights.safetensors_reader import CheckpointReader, TensorInfo, bytes_per_element

__all__ = ["Progress", "canonical_name", "load_dummy_weights", "load_weights"]

Progress = Callable[[int, int], None]

# Tensors that checkpoints carry although nothing here needs them: tables that are recomputed, and the weights of
# multi-token prediction, which is not used.
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".attn.bias", ".masked_bias")
_IGNORED_PREFIXES = ("mtp.", "model.mtp.")
# The other half of a multimodal checkpoint whose language model is served.
_OTHER_MODALITIES = (
    "model.visual.",
    "visual.",
    "model.vision_tower.",
    "vision_tower.",
    "model.multi_modal_projector.",
    "multi_modal_projector.",
)


@dataclass(frozen=True, slots=True)
class _Read:
    """One slice of one tensor, and the parameter it goes to."""

    info: TensorInfo
    module: Loadable
    placement: Placement

    @property
    def num_bytes(self) -> int:
        return _num_elements(self.placement.source) * bytes_per_element(self.info.dtype)


def load_weights(model: CausalLM, path: str | os.PathLike[str], *, progress: Progress | None = None) -> None:
    """Read this rank's part of the checkpoint in folder `path` into `model`, on its device and in its dtype.

    progress(bytes_done, bytes_total) counts the bytes this rank reads; called before the first and after each
    tensor. Everything is verified against the file headers first. Raises `BadCheckpoint` naming the tensors that are
    missing, unexpected, of the wrong shape or unreadable, and `ModelError` (`out_of_memory`).
    """
    with CheckpointReader(Path(path)) as reader:
        reads = _plan(model, reader)
        reads.sort(key=lambda read: (read.info.file, read.info.offset))
        bytes_total = sum(read.num_bytes for read in reads)
        bytes_done = 0
        if progress is not None:
            progress(0, bytes_total)
        with torch.inference_mode(False), torch.no_grad():
            for read in reads:
                target = materialise(model, read.module, read.placement.parameter)[read.placement.target]
                source = reader.read(read.info.name, read.placement.source)
                target.copy_(source.to(target.device))
                bytes_done += read.num_bytes
                if progress is not None:
                    progress(bytes_done, bytes_total)
    finish(model)


def canonical_name(name: str) -> str:
    """A tensor's name as a plain text checkpoint has it: multimodal ones wrap the language model in one of two ways."""
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    return name.removeprefix("language_model.")


def _plan(model: CausalLM, reader: CheckpointReader) -> list[_Read]:
    """What to read where. Raises `BadCheckpoint` unless tensors and model fit exactly."""
    available = {canonical_name(name): info for name, info in reader.tensors.items()}
    if len(available) != len(reader.tensors):
        raise BadCheckpoint("the checkpoint holds its language model twice, under different prefixes")
    reads: list[_Read] = []
    missing: list[str] = []
    misshapen: list[str] = []
    for prefix, module, part in model.checkpoint_modules():
        for placement in module.placements(part):
            name = f"{prefix}.{placement.suffix}"
            info = available.pop(name, None)
            if info is None:
                missing.append(name)
            elif info.shape != placement.checkpoint_shape:
                misshapen.append(f"{name} {list(info.shape)} (expected {list(placement.checkpoint_shape)})")
            elif info.dtype.startswith(("I", "U", "BOOL", "F8")):
                raise BadCheckpoint(f"dtype {info.dtype} is not supported for weights", tensors=[name])
            elif _num_elements(placement.source):
                reads.append(_Read(info, module, placement))
    if model.lm_head.is_tied:
        available.pop("lm_head.weight", None)  # some checkpoints store the tied matrix twice
    unexpected = sorted(name for name in available if not _is_ignored(name))
    if missing:
        raise BadCheckpoint("the checkpoint lacks tensors that the model needs", tensors=missing)
    if misshapen:
        raise BadCheckpoint("tensors have another shape than config.json says", tensors=misshapen)
    if unexpected:
        raise BadCheckpoint("the checkpoint holds tensors that the model does not know", tensors=unexpected)
    _verify_coverage(model, reads)
    return reads


def _is_ignored(name: str) -> bool:
    return name.endswith(_IGNORED_SUFFIXES) or name.startswith(_IGNORED_PREFIXES + _OTHER_MODALITIES)


def _verify_coverage(model: CausalLM, reads: list[_Read]) -> None:
    """Every element of every parameter is written exactly once: the parts add up, and none overlap.

    A violation is an error in a family's name map, not in the checkpoint: RuntimeError.
    """
    owners = {id(module): name for name, module in model.named_modules()}
    targets: dict[tuple[int, str], list[Slices]] = {}
    for read in reads:
        targets.setdefault((id(read.module), read.placement.parameter), []).append(read.placement.target)
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

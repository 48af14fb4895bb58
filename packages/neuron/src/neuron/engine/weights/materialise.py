"""From the meta device into memory: parameters are allocated one at a time, when they are about to be filled."""

from __future__ import annotations

import ctypes
import mmap
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from neuron.engine.errors import ModelError, is_out_of_memory
from neuron.engine.models.decoder import CausalLM
from neuron.engine.weight_slices import Loadable

_HUGE_PAGE_BYTES = 2 * 2**20
_BALLOONS = Path("/sys/bus/virtio/drivers/virtio_balloon")
# VIRTIO_BALLOON_F_REPORTING (virtio specification, section 5.5.3).
_REPORTING_BIT = 5


def materialise(model: CausalLM, module: Loadable, name: str) -> Tensor:
    """The parameter `name` of `module` in memory, allocated at the first call. Raises `ModelError` (out_of_memory)."""
    assert isinstance(module, nn.Module)
    parameter = module.get_parameter(name)
    if parameter.is_meta:
        allocate = torch.zeros if getattr(module, "padding_elements", 0) else torch.empty
        try:
            memory = allocate(parameter.shape, dtype=parameter.dtype, device=model.device)
        except (RuntimeError, MemoryError) as exc:
            if not is_out_of_memory(exc):
                raise
            num_bytes = parameter.numel() * parameter.dtype.itemsize
            raise ModelError("out_of_memory", f"no memory for {num_bytes} bytes of weights: {exc}") from exc
        if model.device.type == "cpu" and not gives_free_memory_back():
            _prefer_huge_pages(memory)
        parameter = nn.Parameter(memory, requires_grad=False)
        setattr(module, name, parameter)
    return parameter


@cache
def gives_free_memory_back(balloons: Path = _BALLOONS) -> bool:
    """Whether this is a virtual machine that hands its free memory to its host.

    It does so in runs of 2 MiB, so that a large page always has to be fetched from the host again, which took two to
    four times as long as ordinary pages that had been in use before.
    """
    for features in balloons.glob("virtio*/features"):
        try:
            bits = features.read_text()
        except OSError:
            continue
        if bits[_REPORTING_BIT : _REPORTING_BIT + 1] == "1":
            return True
    return False


def _prefer_huge_pages(memory: Tensor) -> None:
    """Ask for pages of 2 MiB, where the host has them to give.

    Most of loading a model into host memory is the kernel's work of handing out its pages: with pages of 4 KiB two
    cores filled 2 GB in a second, with these 10.
    """
    first = -(-memory.data_ptr() // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    end = (memory.data_ptr() + memory.nbytes) // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES
    if first < end:
        # A host that does not know the advice refuses it, which changes nothing.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_HUGEPAGE)


def finish(model: CausalLM) -> None:
    """What follows when every parameter is filled: layers rearrange and derive what they need."""
    with torch.inference_mode(False), torch.no_grad():
        model.finish_loading()

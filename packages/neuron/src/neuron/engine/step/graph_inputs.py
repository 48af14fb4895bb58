"""The fixed places of a CUDA graph's sampling: parameters that the host writes before each step, results it leaves."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from neuron.engine.device_stream import Fence, Stream
from neuron.engine.sampling.sampler import fill_parameters
from neuron.engine.sampling.sampling_rows import SamplingRows


class GraphInputs:
    """For up to `max_rows` rows.

    report: [max_rows] int64, see `sampler.report_of`. Parameters are one block of memory, copied in one go from one of
    two host blocks, because a step is prepared while the copy of the one before may wait for the device.
    """

    def __init__(self, max_rows: int, *, device: torch.device, stream: Stream) -> None:
        # Rows of 128 bytes keep every pointer aligned.
        self._width = width = -(-max_rows // 32) * 32
        self._stream = stream
        pinned = device.type == "cuda"
        # Two rows of int64 (top_k, key), then three of float32 (temperature, top_p, min_p).
        size = 2 * width + (3 * width + 1) // 2
        self._hosts = [torch.zeros(size, dtype=torch.int64, pin_memory=pinned) for _ in range(2)]
        self._copied: list[Fence | None] = [None, None]
        self._block = torch.zeros(size, dtype=torch.int64, device=device)
        self.report = torch.zeros(max_rows, dtype=torch.int64, device=device)
        # Rows that the block holds the parameters of plain greedy sampling for; most steps of most servers are such.
        self._num_plain = 0

    def parameters(self, num_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """temperatures, top_ks, top_ps, min_ps, keys, [num_rows] each, as the sampling kernel takes them."""
        width = self._width
        integers = self._block[: 2 * width].view(2, width)[:, :num_rows]
        floats = self._block[2 * width :].view(torch.float32)[: 3 * width].view(3, width)[:, :num_rows]
        return floats[0], integers[0], floats[1], floats[2], integers[1]

    def stage(self, rows: SamplingRows, num_rows: int) -> None:
        """Copy the parameters of a step's rows to their place; further ones up to `num_rows` may be anything."""
        if rows.is_plain and self._num_plain >= num_rows:
            return
        width = self._width
        self._hosts.reverse()
        self._copied.reverse()
        host, copied = self._hosts[0], self._copied[0]
        if copied is not None:
            copied.wait()
        array = host.numpy()
        integers = array[: 2 * width].reshape(2, width)
        floats = array[2 * width :].view(np.float32)[: 3 * width].reshape(3, width)
        number = width if rows.is_plain else rows.num_rows
        fill_parameters(rows, floats[:, :number], integers[:, :number])
        self._num_plain = number if rows.is_plain else 0
        block = self._block

        def copy() -> None:
            block.copy_(host, non_blocking=True)

        self._stream.submit(copy)
        self._copied[0] = self._stream.record()

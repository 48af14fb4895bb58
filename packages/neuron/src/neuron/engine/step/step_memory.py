"""Memory that a step needs on this rank, asked before it is launched.

A rank that runs out of memory in the middle of a forward pass leaves the others in a collective that nobody joins. So
before a step that is larger than any since the last shortage, each rank tries (CUDA) or estimates (CPU) what its
activations take, and rank 0 launches it only if all have room.
"""

from __future__ import annotations

import torch

from neuron.checkpoint.layout import RankSizes, activation_bytes_per_token, logit_bytes_per_row
from neuron.engine.errors import is_out_of_memory
from neuron.host_memory import available_host_bytes

# A host that has less than this left is in trouble whatever a step takes.
_HOST_FLOOR_BYTES = 64 * 2**20


class StepMemory:
    """What a step takes on one rank: an upper estimate (`checkpoint.layout`), against what is free."""

    def __init__(self, rank: RankSizes, *, dtype: torch.dtype, device: torch.device, world_size: int) -> None:
        self.bytes_per_token = activation_bytes_per_token(rank, dtype.itemsize)
        self.bytes_per_row = logit_bytes_per_row(rank, dtype.itemsize)
        self._device = device
        # Ranks on the CPU ask at the same time and take from the same memory.
        self._num_sharers = world_size if device.type == "cpu" else 1

    def max_tokens(self, num_tokens: int, num_rows: int) -> int:
        """The largest step of at most `num_tokens` tokens that fits now, with the logits of `num_rows` rows."""
        wanted = num_tokens * self.bytes_per_token + num_rows * self.bytes_per_row
        available = self._available(wanted)
        if available >= wanted:
            return num_tokens
        return max((available - num_rows * self.bytes_per_row) // self.bytes_per_token, 0)

    def _available(self, wanted: int) -> int:
        if self._device.type == "cpu":
            return max(available_host_bytes() - _HOST_FLOOR_BYTES, 0) // self._num_sharers
        try:
            # One block: what is free in many small ones does not count. It stays with the allocator for the step.
            block = torch.empty(wanted, dtype=torch.uint8, device=self._device)
        except RuntimeError as exc:
            if not is_out_of_memory(exc):
                raise
            free_bytes, _ = torch.cuda.mem_get_info(self._device)
            unused = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
            return min(free_bytes + unused, wanted - 1)
        return block.numel()

"""Contiguous keys and values of a running decode batch, so that its pages are gathered once and not in every step.

Gathering a batch's whole context per step and layer costs more than attending to it. As long as the same sequences
decode together, each step only appends one key and one value per sequence. The pages stay the truth: they are always
written, and the workspace is thrown away as soon as a step is not the exact continuation of the one before.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_MIN_SLACK_PAGES = 4
_SLACK_SHARE = 8  # an eighth of the context
# The part of a layer's pages that its workspace may take in addition.
_MAX_SHARE_OF_CACHE = 0.5


@dataclass(slots=True)
class DecodeWorkspace:
    """Keys and values of S sequences per layer, [S, Hkv, capacity, D] each: one head's context is one run of memory.

    page_tables: [S, n] on the host, this step's, padded with page 0. context_lens: lengths after this step. capacity:
    in tokens, a multiple of the page size. step: counts the steps it has lived through. appended: [S * Hkv] int64,
    where this step's tokens go in a layer's tensors seen as [S * Hkv * capacity, D]. layers: by the address of the
    layer's pages, keys, values and the step that they are up to date with.
    """

    page_tables: npt.NDArray[np.int32]
    context_lens: list[int]
    page_size: int
    num_kv_heads: int
    device: torch.device
    capacity: int = field(init=False)
    step: int = field(init=False, default=0)
    appended: Tensor = field(init=False)
    layers: dict[int, tuple[Tensor, Tensor, int]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        num_pages = -(-max(self.context_lens) // self.page_size)
        self.capacity = (num_pages + max(_MIN_SLACK_PAGES, num_pages // _SLACK_SHARE)) * self.page_size
        last = np.array(self.context_lens, dtype=np.int64) - 1
        row = np.arange(len(self.context_lens) * self.num_kv_heads).reshape(-1, self.num_kv_heads)
        self.appended = torch.from_numpy((row * self.capacity + last[:, None]).ravel()).to(self.device)

    def fits(self, kv_layer: Tensor) -> bool:
        """True if it takes no more memory than it may beside these pages."""
        num_slots = kv_layer.shape[0] * kv_layer.shape[2]
        return len(self.context_lens) * self.capacity <= _MAX_SHARE_OF_CACHE * num_slots

    def advance(self, page_tables: npt.NDArray[np.int32], context_lens: list[int]) -> bool:
        """Move on by one step. False, and unusable from then on, unless that is the same batch one token later.

        A sequence is recognised by its place, its pages and its length. That is enough between two consecutive steps
        with decodes: pages that a sequence held in the last step cannot have been filled for another one since.
        """
        if len(context_lens) != len(self.context_lens) or max(context_lens) > self.capacity:
            return False
        if any(now != before + 1 for now, before in zip(context_lens, self.context_lens, strict=True)):
            return False
        before = self.page_tables
        now = page_tables[:, : before.shape[1]]
        if now.shape != before.shape or not ((now == before) | (before == 0)).all():
            return False
        self.page_tables = page_tables
        self.context_lens = context_lens
        self.step += 1
        self.appended += 1
        return True

    def append(self, kv_layer: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor] | None:
        """Add this step's token of each sequence (keys, values: [S, Hkv, D]) to a layer; returns the layer's tensors.

        None if the layer did not take part in the last step, because it has a window and the step was longer than
        that, or because the step failed before it came to this layer.
        """
        entry = self.layers.get(kv_layer.data_ptr())
        if entry is None or entry[2] != self.step - 1:
            return None
        for kept, new in zip(entry[:2], (keys, values), strict=True):
            head_dim = kept.shape[-1]
            kept.view(-1, head_dim).index_copy_(0, self.appended, new.reshape(-1, head_dim))
        self.layers[kv_layer.data_ptr()] = entry[0], entry[1], self.step
        return entry[0], entry[1]

    def fill(self, kv_layer: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take a layer's keys and values up to this step, gathered through `padded_tables`: [S, capacity, Hkv, D]."""
        keys, values = keys.transpose(1, 2).contiguous(), values.transpose(1, 2).contiguous()
        self.layers[kv_layer.data_ptr()] = keys, values, self.step
        return keys, values

    def padded_tables(self) -> npt.NDArray[np.int32]:
        """[S, capacity / page_size]: the pages to gather, page 0 for what has not been written yet."""
        padding = self.capacity // self.page_size - self.page_tables.shape[1]
        return np.pad(self.page_tables, ((0, 0), (0, padding)))

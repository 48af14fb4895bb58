"""Contiguous keys and values of a running decode batch, so that its pages are gathered once and not in every step.

Gathering a batch's whole context per step and layer costs more than attending to it. As long as the same sequences
decode together, each step only appends one key and one value per sequence. The pages stay the truth: they are always
written, and the workspace is thrown away as soon as a step is not the exact continuation of the one before.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_MIN_SLACK_PAGES = 4
_SLACK_SHARE = 8  # an eighth of the context
# The part of a layer's pages that its workspace may take in addition.
_MAX_SHARE_OF_CACHE = 0.5


class DecodeWorkspace:
    """Keys and values of S sequences per layer, one head's context being one run of memory.

    page_tables: [S, n] on the host, padded with page 0, at least as wide as the longest sequence. context_lens: their
    lengths after this step. Room is left for `capacity` tokens, a multiple of the page size. dtype: of the mask.
    """

    def __init__(
        self,
        page_tables: npt.NDArray[np.int32],
        context_lens: list[int],
        *,
        page_size: int,
        num_kv_heads: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._page_tables = page_tables
        self._context_lens = context_lens
        self._page_size = page_size
        num_pages = -(-max(context_lens) // page_size)
        self.capacity = (num_pages + max(_MIN_SLACK_PAGES, num_pages // _SLACK_SHARE)) * page_size
        self._step = 0
        # By the address of a layer's pages: [2, S * Hkv, 1, capacity, D], keys and values, and the step they belong to.
        self._layers: dict[int, tuple[Tensor, int]] = {}

        lens = np.array(context_lens, dtype=np.int64)
        rows = np.arange(2 * len(lens) * num_kv_heads).reshape(2, len(lens), num_kv_heads)
        appended = rows * self.capacity + (lens - 1)[:, None]
        # Where this step's tokens go in a layer's tensor seen as [2 * S * Hkv * capacity, D].
        self._appended = torch.from_numpy(appended.ravel()).to(device)
        # [S * Hkv, 1, 1, capacity]; sequences of one length need none.
        self._mask: Tensor | None = None
        if lens.min() != lens.max():
            hidden = torch.from_numpy(np.arange(self.capacity) >= lens[:, None]).to(device)
            mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
            self._mask = mask.repeat_interleave(num_kv_heads, dim=0)[:, None, None]

    def mask(self, length: int) -> Tensor | None:
        """[S * Hkv, 1, 1, length], added to the scores of the first `length` keys; None if all sequences are full."""
        return None if self._mask is None else self._mask[..., :length]

    @property
    def num_slots(self) -> int:
        """Tokens that it has room for, all sequences together: what it takes of each layer that it keeps."""
        return len(self._context_lens) * self.capacity

    def fits(self, kv_layer: Tensor, others: int) -> bool:
        """True if it and other workspaces of `others` slots take no more memory than they may beside these pages."""
        num_slots = kv_layer.shape[0] * kv_layer.shape[2]
        return others + self.num_slots <= _MAX_SHARE_OF_CACHE * num_slots

    def advance(self, page_tables: npt.NDArray[np.int32], context_lens: list[int]) -> bool:
        """Move on by one step. False, and unusable from then on, unless that is the same batch one token later.

        A sequence is recognised by its place, its pages and its length. That is enough between two consecutive steps
        with decodes: pages that a sequence held in the last step cannot have been filled for another one since.
        """
        if context_lens != [length + 1 for length in self._context_lens] or max(context_lens) > self.capacity:
            return False
        before = self._page_tables
        now = page_tables[:, : before.shape[1]]
        if now.shape != before.shape or not ((now == before) | (before == 0)).all():
            return False
        self._page_tables = page_tables
        self._context_lens = context_lens
        self._step += 1
        self._appended += 1
        if self._mask is not None:
            self._mask.view(-1).index_fill_(0, self._appended[: self._mask.shape[0]], 0.0)
        return True

    def append(self, kv_layer: Tensor, new: Tensor) -> Tensor | None:
        """Add this step's token of each sequence, keys and values [2, S, Hkv, D], to a layer.

        Returns the layer's [2, S * Hkv, 1, capacity, D]; None if the layer did not take part in the last step, because
        it has a window and the step was longer than that, or because the step failed before it came to this layer.
        """
        address = kv_layer.data_ptr()
        entry = self._layers.get(address)
        if entry is None or entry[1] != self._step - 1:
            return None
        kept = entry[0]
        kept.view(-1, kept.shape[-1]).index_copy_(0, self._appended, new.reshape(-1, kept.shape[-1]))
        self._layers[address] = kept, self._step
        return kept

    def fill(self, kv_layer: Tensor, gathered: Tensor) -> Tensor:
        """Take a layer's keys and values up to this step, gathered through `padded_tables`: [2, S, Hkv, capacity, D].

        Returns them as `append` does.
        """
        kept = gathered.contiguous().flatten(1, 2).unsqueeze(2)
        self._layers[kv_layer.data_ptr()] = kept, self._step
        return kept

    def padded_tables(self) -> npt.NDArray[np.int32]:
        """[S, capacity / page_size]: the pages to gather, page 0 for what has not been written yet."""
        padding = self.capacity // self._page_size - self._page_tables.shape[1]
        return np.pad(self._page_tables, ((0, 0), (0, padding)))

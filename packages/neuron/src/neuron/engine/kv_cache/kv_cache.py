"""The paged KV cache as tensors, and how large it may be. Which page belongs to whom is `page_pool`'s business."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from neuron.engine.errors import ModelError
from neuron.protocol import CacheGroup


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape of the cache on one rank: a page holds `page_size` tokens of every layer, whatever its group."""

    groups: tuple[CacheGroup, ...]
    page_size: int
    dtype: torch.dtype

    @classmethod
    def uniform(cls, num_layers: int, num_kv_heads: int, head_dim: int, page_size: int, dtype: torch.dtype) -> KVLayout:
        """Of a model whose layers are all alike."""
        layers = tuple(range(num_layers))
        return cls((CacheGroup(layers, num_kv_heads, head_dim, dtype.itemsize),), page_size, dtype)

    @property
    def layers(self) -> list[CacheGroup]:
        """The group of each layer."""
        of_layer = {layer: group for group in self.groups for layer in group.layers}
        return [of_layer[layer] for layer in range(len(of_layer))]

    @property
    def bytes_per_token(self) -> int:
        return sum(group.bytes_per_token for group in self.groups)

    @property
    def bytes_per_page(self) -> int:
        return self.bytes_per_token * self.page_size

    def pages_for_tokens(self, num_tokens: int) -> int:
        """Pages to allocate so that `num_tokens` slots are usable: rounded up, plus page 0."""
        return -(-num_tokens // self.page_size) + 1

    def pages_for_bytes(self, num_bytes: int) -> int:
        """Pages (page 0 included) that fit into a byte budget.

        Raises `ModelError` (`out_of_memory`) when not even one usable page fits.
        """
        num_pages = num_bytes // self.bytes_per_page
        if num_pages < 2:
            raise ModelError(
                "out_of_memory",
                f"the KV cache has {num_bytes} bytes, but two pages of {self.page_size} tokens need "
                f"{2 * self.bytes_per_page}",
            )
        return num_pages


class PagedKV:
    """Keys and values of every layer, in pages of `page_size` token slots.

    One tensor per layer, `[num_pages, 2, page_size, num_kv_heads, head_dim]` (K = [:, 0], V = [:, 1]), contiguous,
    so that a page is one run of memory. Page 0 is never given to a sequence: page tables are padded with it and
    padding tokens of a CUDA graph write to it. Pages start as zeros, so that a masked slot can never hold a NaN
    (0 * NaN = NaN would leak through a masked product).
    """

    def __init__(self, layout: KVLayout, num_pages: int, device: torch.device) -> None:
        if num_pages < 2:
            raise ValueError("a cache needs page 0 and at least one usable page")
        self.layout = layout
        self.device = device
        self.num_pages = num_pages
        self.page_size = layout.page_size
        try:
            self._layers = [
                torch.zeros(
                    (num_pages, 2, layout.page_size, group.num_kv_heads, group.head_dim),
                    dtype=layout.dtype,
                    device=device,
                )
                for group in layout.layers
            ]
        except (RuntimeError, MemoryError) as exc:
            raise ModelError(
                "out_of_memory", f"cannot allocate {num_pages * layout.bytes_per_page} bytes of KV cache: {exc}"
            ) from exc

    @property
    def num_bytes(self) -> int:
        return self.num_pages * self.layout.bytes_per_page

    def layer(self, index: int) -> Tensor:
        """`[num_pages, 2, page_size, num_kv_heads, head_dim]` of one layer; written in place by attention."""
        return self._layers[index]

    def zero(self, pages: Iterable[int]) -> None:
        """Overwrite pages with zeros: a NaN that a sequence wrote must not meet the pages' next owner."""
        indexes = torch.tensor(list(pages), dtype=torch.int64, device=self._layers[0].device)
        if indexes.numel():
            for layer in self._layers:
                layer.index_fill_(0, indexes, 0)

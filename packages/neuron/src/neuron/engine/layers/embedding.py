"""The vocabulary's two ends: token embedding and output head, both split by rows of the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuron.checkpoint.block_types import BLOCK_TYPES, NATIVE_BITS
from neuron.checkpoint.sharding import shard_vocabulary, vocabulary_sizes
from neuron.engine.gemm.gemm import Product, arrange
from neuron.engine.parallel.group import ParallelGroup
from neuron.engine.weight_slices import WeightSlice

if TYPE_CHECKING:
    from neuron.engine.quantization.block_panels import BlockPanels


class VocabularyWeight(nn.Module):
    """Rows of a [vocab, hidden] matrix that this rank holds; rows beyond the vocabulary are zero."""

    weight: nn.Parameter

    def __init__(self, vocab_size: int, hidden_size: int, *, group: ParallelGroup) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.group = group
        self.shard, rows = shard_vocabulary(vocab_size, group)
        self.weight = nn.Parameter(torch.empty(rows, hidden_size), requires_grad=False)
        self.uses_native_kernels = False
        # Where it is held in blocks of GGUF: their type, and once it is loaded its panels.
        self.kind: str | None = None
        self.panels: BlockPanels | None = None

    def can_hold(self, kind: str) -> bool:
        """Whether it can be held in blocks of a type of GGUF, as it is stored."""
        return kind in NATIVE_BITS and self.hidden_size % 32 == 0

    def hold_blocks(self, kinds: Mapping[str | None, str]) -> None:
        """Become a matrix in blocks, before anything is read."""
        (self.kind,) = kinds.values()
        block = BLOCK_TYPES[self.kind]
        width = self.hidden_size // block.block_elements * block.block_bytes
        memory = torch.empty(self.weight.shape[0], width, dtype=torch.uint8, device=self.weight.device)
        self.weight = nn.Parameter(memory, requires_grad=False)

    def finish_loading(self) -> None:
        """Rearrange blocks; once."""
        if self.kind is not None and self.panels is None:
            from neuron.engine.quantization.block_panels import pack_blocks

            self.panels = pack_blocks(self.kind, self.weight.data)
            self.weight = nn.Parameter(self.panels.data, requires_grad=False)

    def weight_slices(self, part: str | None) -> list[WeightSlice]:
        columns = slice(0, self.hidden_size)
        return [
            WeightSlice(
                "weight",
                (self.vocab_size, self.hidden_size),
                (self.shard.slice, columns),
                "weight",
                (slice(0, self.shard.length), slice(0, self.weight.shape[1])),
                stored=self.kind,
            )
        ]

    @property
    def padding_elements(self) -> int:
        """Elements of `weight` that no checkpoint tensor fills; the loader leaves them zero."""
        return (self.weight.shape[0] - self.shard.length) * self.weight.shape[1]


class VocabParallelEmbedding(VocabularyWeight):
    """[T] token ids -> [T, H] on every rank. The result is a new tensor that the caller may overwrite.

    out_dtype: of the result; the weight may be stored in another one.
    """

    out_dtype = torch.float32

    def forward(self, token_ids: Tensor) -> Tensor:
        if self.group.world_size == 1:
            return self._rows(token_ids)
        local = token_ids - self.shard.start
        is_elsewhere = (local < 0) | (local >= self.shard.length)
        hidden = self._rows(local.masked_fill_(is_elsewhere, 0))
        hidden.masked_fill_(is_elsewhere.unsqueeze(-1), 0)
        return self.group.all_reduce(hidden)

    def _rows(self, indices: Tensor) -> Tensor:
        if self.panels is not None:
            from neuron.engine.quantization.block_weight import gathered

            return gathered(self.panels, indices).to(self.out_dtype)
        if self.weight.dim() == 2:
            return F.embedding(indices, self.weight).to(self.out_dtype)
        from neuron.engine.gemm.native import rows_of  # a tied head has put it into panels

        return rows_of(self.weight, indices).to(self.out_dtype)


class LMHead(nn.Module):
    """[R, H] hidden states -> [R, V] float32 logits on every rank.

    Either with a matrix of its own or tied to the embedding's, whose memory it then shares.
    """

    def __init__(self, embedding: VocabParallelEmbedding, *, tied: bool) -> None:
        super().__init__()
        self.vocab_size = embedding.vocab_size
        self.group = embedding.group
        self._sizes = vocabulary_sizes(embedding.vocab_size, embedding.group)
        self.matrix = (
            None if tied else VocabularyWeight(embedding.vocab_size, embedding.hidden_size, group=embedding.group)
        )
        # In a tuple, so that the embedding is not registered a second time as a submodule of the head.
        self._embedding = (embedding,)
        self.weight: Tensor | None = None
        self.product: Product | None = None
        self._multiplies_in_float32 = False

    @property
    def is_tied(self) -> bool:
        return self.matrix is None

    def finish_loading(self) -> None:
        holder = self._embedding[0] if self.matrix is None else self.matrix
        holder.finish_loading()
        self._multiplies_in_float32 = holder.uses_native_kernels
        if holder.panels is not None:
            from neuron.engine.quantization.block_weight import BlockProduct

            self.weight, self.product = holder.weight, BlockProduct([holder.panels])
            return
        self.weight, self.product = arrange(holder.weight.detach(), native=holder.uses_native_kernels)
        holder.weight = nn.Parameter(self.weight, requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        if self.weight is None or self.product is None:
            raise RuntimeError("the head is used before its weights were loaded")
        if self._multiplies_in_float32:
            hidden = hidden.float()  # exact, and so are its products: logits of 16 bits would make ties
        logits = self.group.all_gather(self.product.linear(hidden, self.weight, None), self._sizes)
        return logits[:, : self.vocab_size].float()

"""The interface between steps, attention and models: a step's batch, its context, and what a backend implements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from neuron.engine.kv_cache.kv_cache import PagedKV


@dataclass(slots=True)
class StepBatch:
    """One flat varlen forward pass over T tokens of S sequences, without padding; decodes first, then prefill chunks.

    token_ids, positions: [T] int64. slot_mapping: [T] int64, page * page_size + offset where each token's K and V
    are written. query_start: [S+1] int32, cumulative query lengths. context_lens: [S] int32, KV length after this
    step's tokens are written. page_tables: [S, max_pages] int32, page 0 is padding. logits_indices: [R] int64,
    rows of T whose logits are wanted. The `_host` lists are copies, so that CPU attention needs no sync.
    A negative token id -1 - r stands for the token that row r of the step before has sampled, until the runner has
    replaced it. The tensors are views of the builder's buffers and are valid until its next `build`.
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    query_start: Tensor
    context_lens: Tensor
    page_tables: Tensor
    logits_indices: Tensor
    query_lens_host: list[int]
    context_lens_host: list[int]
    num_decodes: int  # the first num_decodes sequences have exactly one query token
    max_query_len: int
    max_context_len: int

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def num_sequences(self) -> int:
        return len(self.query_lens_host)


class AttentionBackend(Protocol):
    """Paged attention on one kind of device. One instance per engine, used by its device thread."""

    def prepare(self, batch: StepBatch) -> None:
        """Once per step, before the first layer: forget the last step."""
        ...

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_layer: Tensor,
        batch: StepBatch,
        *,
        scale: float,
        sliding_window: int | None,
    ) -> Tensor:
        """Write this step's keys and values into their pages, then let each query attend to its sequence so far.

        q: [T, Hq, D]; k, v: [T, Hkv, D]; rows may be strided. kv_layer: [num_pages, 2, page_size, Hkv, D].
        Query position p sees the keys of positions p - sliding_window + 1 … p (0 … p without a window).
        Returns [T, Hq, D] in q's dtype, contiguous.
        """
        ...

    def attend(
        self, q: Tensor, kv_layer: Tensor, batch: StepBatch, *, scale: float, sliding_window: int | None
    ) -> Tensor:
        """`forward` where keys and values have already been written (by a fused kernel)."""
        ...


@dataclass(slots=True)
class StepContext:
    """What a model's forward pass needs beyond its weights; passed explicitly, there is no global."""

    batch: StepBatch
    kv: PagedKV
    attention: AttentionBackend

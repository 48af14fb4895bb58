"""The vocabulary's ends: rows of the table, and logits, with weights as they are stored or in panels."""

from __future__ import annotations

import pytest
import torch
from neuron.engine.layers.embedding import LMHead, VocabParallelEmbedding
from neuron.engine.parallel.group import ParallelGroup
from torch import Tensor, nn

from tests.native import needs_native_kernels

VOCAB, HIDDEN = 70, 24


def table(dtype: torch.dtype) -> Tensor:
    return torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(0)).to(dtype)


def built(weight: Tensor, *, native: bool, tied: bool) -> tuple[VocabParallelEmbedding, LMHead]:
    embedding = VocabParallelEmbedding(VOCAB, HIDDEN, group=ParallelGroup.single())
    head = LMHead(embedding, tied=tied)
    for holder in [embedding] if head.matrix is None else [embedding, head.matrix]:
        holder.uses_native_kernels = native
        # As the loader gives it: rows for a group's parts, zeros beyond the vocabulary.
        rows = torch.zeros(holder.weight.shape, dtype=weight.dtype)
        rows[:VOCAB] = weight
        holder.weight = nn.Parameter(rows, requires_grad=False)
    head.finish_loading()
    return embedding, head


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("native", "dtype"),
    [
        (False, torch.float32),
        pytest.param(True, torch.float32, marks=needs_native_kernels),
        pytest.param(True, torch.bfloat16, marks=needs_native_kernels),
    ],
)
def test_rows_and_logits_are_those_of_the_stored_table(tied: bool, native: bool, dtype: torch.dtype) -> None:
    weight = table(dtype)
    embedding, head = built(weight, native=native, tied=tied)
    ids = torch.tensor([0, 69, 31, 32, 32])
    assert torch.equal(embedding(ids), weight[ids].float()), "float32 of what is stored, exactly"
    hidden = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(head(hidden), hidden @ weight.float().T, atol=1e-5, rtol=1e-5)
    assert head.is_tied == tied and head(hidden).shape == (3, VOCAB)
    if tied:
        assert head.weight is not None and head.weight.data_ptr() == embedding.weight.data_ptr(), "one copy"


def test_a_head_without_weights_says_so() -> None:
    head = LMHead(VocabParallelEmbedding(VOCAB, HIDDEN, group=ParallelGroup.single()), tied=True)
    with pytest.raises(RuntimeError, match="used before its weights were loaded"):
        head(torch.zeros(1, HIDDEN))

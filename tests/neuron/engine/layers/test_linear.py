"""Linear layers and the vocabulary's ends: what each rank holds, and that the ranks together compute the whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from neuron.checkpoint.sharding import UnsupportedSharding
from neuron.engine.layers.embedding import LMHead, VocabParallelEmbedding
from neuron.engine.layers.linear import (
    ColumnParallelLinear,
    LinearLayer,
    MergedColumnParallelLinear,
    OutputPart,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedWeight,
)
from neuron.engine.parallel.group import ParallelGroup
from neuron.engine.weight_slices import Loadable
from torch import Tensor

SINGLE = ParallelGroup.single()


class LoneRank(ParallelGroup):
    """A rank whose collectives do nothing, so that a test can combine the ranks' results itself."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor, sizes: object = None) -> Tensor:
        return x


def ranks(world_size: int) -> list[LoneRank]:
    return [LoneRank(rank, world_size) for rank in range(world_size)]


def fill(layer: Loadable, tensors: dict[tuple[str | None, str], Tensor]) -> None:
    """What the loader does, from tensors named by (part, suffix)."""
    for part in {part for part, _ in tensors}:
        for weight_slice in layer.weight_slices(part):
            source = tensors[part, weight_slice.suffix]
            assert tuple(source.shape) == weight_slice.checkpoint_shape
            if source[weight_slice.source].numel():
                getattr(layer, weight_slice.parameter).data[weight_slice.target] = source[weight_slice.source]
    if hasattr(layer, "finish_loading"):
        layer.finish_loading()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "world_size"), [(4, 2, 1), (4, 2, 2), (4, 2, 4), (8, 1, 4)])
def test_merged_qkv_holds_the_heads_of_its_rank(num_heads: int, num_kv_heads: int, world_size: int, bias: bool) -> None:
    hidden, head_dim = 12, 6
    sizes = {"q": num_heads * head_dim, "k": num_kv_heads * head_dim, "v": num_kv_heads * head_dim}
    weights: dict[tuple[str | None, str], Tensor] = {}
    for part, size in sizes.items():
        weights[part, "weight"] = torch.randn(size, hidden)
        weights[part, "bias"] = torch.randn(size)
    x = torch.randn(5, hidden)
    whole = {
        part: F.linear(x, weights[part, "weight"], weights[part, "bias"] if bias else None).view(5, -1, head_dim)
        for part in sizes
    }
    for group in ranks(world_size):
        layer = QKVParallelLinear(
            hidden, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, bias=bias, group=group
        )
        fill(layer, weights)
        q, k, v = layer(x).view(5, -1, head_dim).split([layer.num_heads, layer.num_kv_heads, layer.num_kv_heads], 1)
        first = group.rank * layer.num_heads
        torch.testing.assert_close(q, whole["q"][:, first : first + layer.num_heads])
        first_kv = first * num_kv_heads // num_heads
        torch.testing.assert_close(k, whole["k"][:, first_kv : first_kv + layer.num_kv_heads])
        torch.testing.assert_close(v, whole["v"][:, first_kv : first_kv + layer.num_kv_heads])


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_column_then_row_parallel_sums_to_the_whole(world_size: int) -> None:
    """The Megatron pair: merged gate and up, then down, whose products are summed over the ranks; one bias in all."""
    hidden, inner = 10, 16
    gate, up, down = torch.randn(inner, hidden), torch.randn(inner, hidden), torch.randn(hidden, inner)
    bias = torch.randn(hidden)
    x = torch.randn(3, hidden)
    expected = F.linear(F.silu(x @ gate.t()) * (x @ up.t()), down, bias)
    total = torch.zeros(3, hidden)
    for group in ranks(world_size):
        merged = MergedColumnParallelLinear(hidden, {"gate": inner, "up": inner}, bias=False, group=group)
        fill(merged, {("gate", "weight"): gate, ("up", "weight"): up})
        row = RowParallelLinear(inner, hidden, bias=True, group=group)
        fill(row, {(None, "weight"): down, (None, "bias"): bias})
        left, right = merged(x).chunk(2, dim=-1)
        total += row(F.silu(left) * right)
    torch.testing.assert_close(total, expected, atol=1e-4, rtol=1e-4)


def test_sizes_that_do_not_divide_are_refused_by_name() -> None:
    group = ParallelGroup(0, 4)
    with pytest.raises(UnsupportedSharding, match=r"attention heads \(6\)"):
        QKVParallelLinear(8, num_heads=6, num_kv_heads=2, head_dim=4, bias=False, group=group)
    with pytest.raises(UnsupportedSharding, match=r"size of gate \(10\)"):
        MergedColumnParallelLinear(8, {"gate": 10}, bias=False, group=group)
    with pytest.raises(UnsupportedSharding, match=r"input size \(10\)"):
        RowParallelLinear(10, 8, bias=False, group=group)


def test_an_unknown_part_is_an_error() -> None:
    with pytest.raises(ValueError, match="not 'down'"):
        MergedColumnParallelLinear(4, {"gate": 4, "up": 4}, bias=False, group=SINGLE).weight_slices("down")


def test_the_weight_format_is_a_strategy() -> None:
    """A layer stores and multiplies through its format alone."""

    class Doubled(UnquantizedWeight):
        def apply(self, layer: LinearLayer, x: Tensor) -> Tensor:
            return 2 * super().apply(layer, x)

        def weight_slices(self, layer: LinearLayer, part: OutputPart, row: int) -> list:  # type: ignore[type-arg]
            return [p for p in super().weight_slices(layer, part, row) if p.suffix == "weight"]

    weight = torch.randn(6, 4)
    layer = ColumnParallelLinear(4, 6, bias=False, group=SINGLE, weight_format=Doubled())
    fill(layer, {(None, "weight"): weight})
    x = torch.randn(2, 4)
    torch.testing.assert_close(layer(x), 2 * (x @ weight.t()))


@pytest.mark.parametrize("rows", [1, 2, 16, 300])
def test_what_is_derived_after_loading_changes_no_product(rows: int) -> None:
    weight = torch.randn(24, 40)
    layer = ColumnParallelLinear(40, 24, bias=False, group=SINGLE)
    fill(layer, {(None, "weight"): weight})
    assert torch.equal(layer.weight, weight)
    x = torch.randn(rows, 40)
    torch.testing.assert_close(layer(x), x @ weight.t())


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_vocabulary_is_split_by_rows_and_padding_never_shows(world_size: int, tied: bool) -> None:
    vocab_size, hidden = 13, 8
    table, head = torch.randn(vocab_size, hidden), torch.randn(vocab_size, hidden)
    ids = torch.arange(vocab_size)
    embedded = torch.zeros(vocab_size, hidden)
    logits = []
    for group in ranks(world_size):
        embedding = VocabParallelEmbedding(vocab_size, hidden, group=group)
        embedding.weight.data.zero_()
        fill(embedding, {(None, "weight"): table})
        lm_head = LMHead(embedding, tied=tied)
        assert lm_head.is_tied is tied
        if lm_head.matrix is not None:
            lm_head.matrix.weight.data.zero_()
            fill(lm_head.matrix, {(None, "weight"): head})
        lm_head.finish_loading()
        embedded += embedding(ids)
        logits.append(lm_head(table))
        real = embedding.shard.length * hidden
        assert embedding.weight.numel() - embedding.padding_elements == real
    torch.testing.assert_close(embedded, table)
    expected = table @ (table if tied else head).t()
    torch.testing.assert_close(torch.cat(logits, dim=-1)[:, :vocab_size], expected, atol=1e-5, rtol=1e-5)
    assert logits[0].dtype == torch.float32


def test_a_head_without_weights_says_so() -> None:
    embedding = VocabParallelEmbedding(4, 2, group=SINGLE)
    with pytest.raises(RuntimeError, match="before its weights were loaded"):
        LMHead(embedding, tied=True)(torch.zeros(1, 2))

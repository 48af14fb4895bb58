"""Ways to multiply by a layer's matrix: which one is taken for so many rows, and rows with bits of their own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from neuron.engine.gemm.activation import silu_mul
from neuron.engine.gemm.gemm import (
    BySize,
    FixedRowsProduct,
    InvariantProduct,
    LibraryProduct,
    Product,
    SplitProduct,
    VectorProduct,
    default_product,
    deterministic_product,
)
from torch import Tensor

NUM_OUT, NUM_IN = 24, 33


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHT, BIAS = normal(NUM_OUT, NUM_IN), normal(NUM_OUT, seed=1)


@pytest.mark.parametrize("bias", [None, BIAS])
@pytest.mark.parametrize("rows", [1, 7, 16, 17, 40])
@pytest.mark.parametrize(
    "product", [default_product(WEIGHT), LibraryProduct(), FixedRowsProduct(8), FixedRowsProduct(1)]
)
def test_every_way_is_the_product(product: Product, rows: int, bias: Tensor | None) -> None:
    x = normal(rows, NUM_IN, seed=2)
    expected = F.linear(x, WEIGHT, bias)
    torch.testing.assert_close(product.linear(x, WEIGHT, bias), expected)
    torch.testing.assert_close(product.gated(x, WEIGHT, bias), silu_mul(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    weight = normal(96, 160).to(dtype)
    product = deterministic_product(weight, default_product(weight))
    assert isinstance(product, FixedRowsProduct)
    x = normal(50, 160, seed=3).to(dtype)
    together, gated = product.linear(x, weight, None), product.gated(x, weight, None)
    for first, end in ((0, 1), (3, 20), (49, 50), (10, 50)):
        assert torch.equal(product.linear(x[first:end], weight, None), together[first:end])
        assert torch.equal(product.gated(x[first:end], weight, None), gated[first:end])


def test_a_block_in_which_the_place_matters_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    real = F.linear

    def placed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Beyond eight rows, the result depends on the place."""
        out = real(x, weight, bias)
        return out + torch.arange(x.shape[0])[:, None] if x.shape[0] > 8 else out

    monkeypatch.setattr(F, "linear", placed)
    assert FixedRowsProduct.for_weight(WEIGHT).num_rows == 8
    monkeypatch.setattr(F, "linear", lambda x, weight: real(x, weight) + torch.arange(x.shape[0])[:, None])
    assert FixedRowsProduct.for_weight(WEIGHT).num_rows == 1


class Named(LibraryProduct):
    """Says which one was asked."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.asked = 0

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        self.asked += 1
        return super().linear(x, weight, bias)


@pytest.mark.parametrize(
    ("rows", "name"), [(0, "few"), (1, "few"), (4, "few"), (5, "some"), (16, "some"), (17, "many")]
)
def test_the_number_of_rows_decides(rows: int, name: str) -> None:
    few, some, many = Named("few"), Named("some"), Named("many")
    product = BySize([(4, few), (16, some)], many)
    assert product.of(rows).name == name
    x = normal(rows, NUM_IN)
    torch.testing.assert_close(product.linear(x, WEIGHT, None), F.linear(x, WEIGHT))
    assert [each.asked for each in (few, some, many)] == [each.name == name for each in (few, some, many)]


def test_our_kernels_say_how_many_rows_they_take() -> None:
    assert VectorProduct.max_rows < SplitProduct.max_rows
    assert not hasattr(InvariantProduct, "max_rows")

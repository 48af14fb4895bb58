# ruff: noqa: E402
"""Products of the native kernels: against float64, against their twin in torch, and against themselves."""

from __future__ import annotations

from tests.native import import_or_skip

import_or_skip()

from collections.abc import Iterator

import neuron_cpu
import pytest
import torch
import torch.nn.functional as F
from neuron.engine.gemm.activation import silu_mul
from neuron.engine.gemm.gemm import arrange, default_product, deterministic_product
from neuron.engine.gemm.native import NativeProduct, pack, rows_of, unpacked
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = neuron_cpu.num_threads()
    neuron_cpu.set_num_threads(request.param)
    assert neuron_cpu.num_threads() == request.param
    yield request.param
    neuron_cpu.set_num_threads(before)


# Rows around a tile's, a block's and a whole step's; outputs and inputs that end within a panel, a block, a vector.
SHAPES = [
    (1, 96, 64),
    (2, 1, 1),
    (5, 33, 7),
    (6, 64, 300),
    (7, 320, 513),
    (13, 200, 512),
    (97, 256, 600),
    (200, 130, 257),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "num_out", "num_in"), SHAPES)
def test_products_are_those_of_the_stored_weight_in_float32(
    threads: int, dtype: torch.dtype, rows: int, num_out: int, num_in: int
) -> None:
    weight = (normal(num_out, num_in, seed=0) / num_in**0.5).to(dtype)
    x, bias = normal(rows, num_in, seed=1), normal(num_out, seed=2)
    expected = x.double() @ weight.double().T + bias
    panels = pack(weight.clone())
    product = NativeProduct(num_out)
    result = product.linear(x, panels, bias)
    torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(result, F.linear(x, unpacked(panels, num_out).float(), bias), atol=1e-5, rtol=1e-5)
    each = torch.cat([product.linear(row, panels, bias) for row in x.split(1)])
    assert torch.equal(each, result), "a row has the same bits in any batch"
    if num_out % 2 == 0:
        torch.testing.assert_close(product.gated(x, panels, bias), silu_mul(result), atol=1e-5, rtol=1e-5)
        each = torch.cat([product.gated(row, panels, bias) for row in x.split(1)])
        assert torch.equal(each, product.gated(x, panels, bias))


@pytest.mark.parametrize("dtype", DTYPES)
def test_panels_hold_the_weight_and_take_its_place(dtype: torch.dtype) -> None:
    weight = normal(96, 50, seed=3).to(dtype)
    kept, address = weight.clone(), weight.data_ptr()
    panels = pack(weight)
    assert panels.shape == (3, 50, 32) and panels.data_ptr() == address, "no second copy"
    assert torch.equal(unpacked(panels, 96), kept)
    indices = torch.tensor([0, 95, 16, 31, 32, 16])
    assert torch.equal(rows_of(panels, indices), kept[indices])


def test_rows_beyond_the_outputs_are_zeros() -> None:
    panels = pack(normal(33, 8, seed=4))
    assert torch.equal(unpacked(panels, 64)[33:], torch.zeros(31, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_activations_of_16_bits_are_rounded_once(dtype: torch.dtype) -> None:
    weight, x = normal(64, 100, seed=5).to(dtype), normal(9, 100, seed=6).to(dtype)
    result = NativeProduct(64).linear(x, pack(weight.clone()), normal(64, seed=7).to(dtype))
    assert result.dtype == dtype
    exact = NativeProduct(64).linear(x.float(), pack(weight.clone()), normal(64, seed=7).to(dtype))
    assert torch.equal(result, exact.to(dtype))


def test_what_is_no_ordinary_number_goes_through() -> None:
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 88.0, -88.0, 300.0, -300.0, 0.0, 1e-30]).unsqueeze(1)
    product, panels = NativeProduct(128), pack(torch.ones(128, 1))
    torch.testing.assert_close(product.linear(x, panels, None), x.expand(-1, 128), equal_nan=True)
    gated, expected = product.gated(x, panels, None), silu_mul(x.expand(-1, 128).contiguous())
    assert not gated[:3].isfinite().any(), "a fault of a device is seen as such behind it too"
    torch.testing.assert_close(gated[3:], expected[3:], rtol=1e-5, atol=1e-6)


def test_rows_may_lie_apart() -> None:
    wide = normal(6, 200, seed=8)
    weight = normal(64, 100, seed=9)
    panels = pack(weight.clone())
    assert torch.equal(
        NativeProduct(64).linear(wide[:, 50:150], panels, None),
        NativeProduct(64).linear(wide[:, 50:150].contiguous(), panels, None),
    )
    apart = normal(100, 6, seed=8).T
    torch.testing.assert_close(NativeProduct(64).linear(apart, panels, None), apart @ weight.T, atol=1e-5, rtol=1e-5)


def test_no_rows_are_an_answer_and_a_wrong_width_is_an_error() -> None:
    panels = pack(normal(64, 10, seed=1))
    assert NativeProduct(64).linear(torch.empty(0, 10), panels, None).shape == (0, 64)
    assert NativeProduct(64).gated(torch.empty(0, 10), panels, None).shape == (0, 32)
    with pytest.raises(ValueError, match="rows of 11 elements, and a weight of 10"):
        NativeProduct(64).linear(torch.empty(1, 11), panels, None)


def test_a_layer_holds_what_it_multiplies_with() -> None:
    weight = normal(40, 16, seed=2)
    held, product = arrange(weight.clone(), native=True)
    assert held.shape == (2, 16, 32) and isinstance(product, NativeProduct)
    assert deterministic_product(held, product) is product, "it is deterministic already"
    held, product = arrange(weight, native=False)
    assert held is weight and product.name == default_product(weight).name

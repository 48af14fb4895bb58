"""Ways to multiply by a linear layer's matrix. Which one a layer takes is decided after loading (`product_choice`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from neuron.engine.gemm import row_blocks
from neuron.engine.gemm.activation import silu_mul

# Rows that the CPU multiplies at once where a row's bits must not depend on its neighbours; the first that does it.
_FIXED_ROWS = (16, 8, 1)


class Product(Protocol):
    """x @ weightᵀ + bias, one way to do it. Stateless but for what was derived from one weight."""

    @property
    def name(self) -> str: ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[T, in], [out, in], [out] -> [T, out] in x's dtype."""
        ...

    def gated(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """silu(first half) * second half of `linear`: [T, out / 2]."""
        ...


class LibraryProduct:
    """torch's: cuBLAS on a GPU, MKL or oneDNN on the CPU; there a second copy of the weight may serve few rows."""

    name = "library"

    def __init__(self, blocks: Tensor | None = None) -> None:
        """blocks: `row_blocks` of the weight that this product will be used with, or None."""
        self.blocks = blocks

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return row_blocks.linear(x, weight, self.blocks, bias)

    def gated(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return silu_mul(self.linear(x, weight, bias))


class VectorProduct:
    """Our kernel for up to 4 rows, on the ordinary cores."""

    name = "vector"
    max_rows = 4

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        from neuron.engine.kernels.gemm.gemv import vector_linear

        return vector_linear(x, weight, bias)

    def gated(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        from neuron.engine.kernels.gemm.gemv import vector_linear

        return vector_linear(x, weight, bias, gated=True)


class SplitProduct:
    """Our kernel for up to 16 rows, on the tensor cores."""

    name = "split"
    max_rows = 16

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        from neuron.engine.kernels.gemm.gemm import split_linear

        return split_linear(x, weight, bias)

    def gated(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        from neuron.engine.kernels.gemm.gemm import split_linear

        return split_linear(x, weight, bias, gated=True)


class InvariantProduct:
    """Our kernel with one order of additions for every number of rows."""

    name = "invariant"

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        from neuron.engine.kernels.gemm.gemm import invariant_linear

        return invariant_linear(x, weight, bias)

    def gated(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return silu_mul(self.linear(x, weight, bias))


class BySize:
    """Different products by the number of rows."""

    name = "by size"

    def __init__(self, table: Sequence[tuple[int, Product]], otherwise: Product) -> None:
        """table: (most rows, product), in rising order; `otherwise` for more rows than the last one takes."""
        self.table = tuple(table)
        self.otherwise = otherwise

    def of(self, num_rows: int) -> Product:
        return next((product for most, product in self.table if num_rows <= most), self.otherwise)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.of(x.shape[0]).linear(x, weight, bias)

    def gated(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.of(x.shape[0]).gated(x, weight, bias)


class FixedRowsProduct:
    """The library's product in blocks of a fixed number of rows, the last one padded with zeros.

    A library chooses its way by the number of rows, and with it the order of additions; with one number there is one
    way. `for_weight` tries whether a row's place in the block matters, and takes smaller blocks where it does.
    """

    name = "fixed rows"

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows

    @classmethod
    def for_weight(cls, weight: Tensor) -> FixedRowsProduct:
        """The largest block in which every place gives the same bits, tried with this weight."""
        return next(product for product in map(cls, _FIXED_ROWS) if product.is_place_free(weight))

    def is_place_free(self, weight: Tensor) -> bool:
        """Whether a row's result has the same bits at every place in the block, tried with this weight."""
        if self.num_rows == 1:
            return True
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.num_rows, weight.shape[1], generator=generator).to(weight.dtype).to(weight.device)
        expected = F.linear(x, weight)
        return all(
            torch.equal(F.linear(x.roll(shift, 0), weight), expected.roll(shift, 0))
            for shift in range(1, self.num_rows)
        )

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
        # A buffer of our own: libraries also look at how their operands are aligned.
        block = torch.zeros(self.num_rows, x.shape[1], dtype=x.dtype, device=x.device)
        for begin in range(0, x.shape[0], self.num_rows):
            rows = x[begin : begin + self.num_rows]
            block[: rows.shape[0]] = rows
            out[begin : begin + self.num_rows] = F.linear(block, weight)[: rows.shape[0]]
        return out if bias is None else out.add_(bias)

    def gated(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return silu_mul(self.linear(x, weight, bias), row_by_row=True)


def default_product(weight: Tensor) -> Product:
    """What a layer takes until something else is decided."""
    return LibraryProduct(row_blocks.row_blocks(weight))


def arrange(weight: Tensor, *, native: bool) -> tuple[Tensor, Product]:
    """A loaded weight [out, in] as a layer is to hold it, and what multiplies by it until something else is decided.

    native: the native CPU kernels do, which want it in another order (`neuron.engine.gemm.native`).
    """
    if not native:
        return weight, default_product(weight)
    from neuron.engine.gemm.native import NativeProduct, pack  # a distribution that may be absent

    return pack(weight), NativeProduct(weight.shape[0])


def deterministic_product(weight: Tensor, product: Product) -> Product:
    """One whose rows get the same bits in any batch; `product`, what a layer of this weight has, where it is one."""
    if product.name == "native":
        return product
    return FixedRowsProduct.for_weight(weight) if weight.device.type == "cpu" else InvariantProduct()

"""A second copy of a float32 weight for CPU products with few rows of input, where MKL's ordinary path is slow.

With 3 to some 100 rows, `F.linear` spends most of its time repacking the weight: a decode step of 16 sequences reads
it at a third of the memory's speed. As a batch of narrow matrices, [out / 32, in, 32], each one goes through MKL's
kernel for small products, which reads it once and in order: 1.3 to 2.4 times faster with 4 to 64 rows, equal from
about 128, slower with one (2-core AVX-512 host, one thread, 256x1280 up to 1024x32000, figures in the commit).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from neuron.host_memory import available_host_bytes, total_host_bytes

_WIDTH = 32
_MIN_ROWS = 3
_MAX_ROWS = 96


def row_blocks(weight: Tensor) -> Tensor | None:
    """The copy of a [out, in] weight: [ceil(out / 32), in, 32], zeros beyond `out`.

    None where it would not help (not float32 on a CPU with MKL), or where it would leave less than half of the host's
    memory available.
    """
    has_mkl: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not has_mkl:
        return None
    if available_host_bytes() - weight.numel() * weight.element_size() < total_host_bytes() // 2:
        return None
    padded = F.pad(weight, (0, 0, 0, -weight.shape[0] % _WIDTH))
    return padded.reshape(-1, _WIDTH, weight.shape[1]).transpose(1, 2).contiguous()


def linear(x: Tensor, weight: Tensor, blocks: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x, weight, bias)`, through `blocks` (of `row_blocks`) where that is faster. x: [T, in] -> [T, out]."""
    num_rows = x.shape[0]
    if blocks is None or not _MIN_ROWS <= num_rows <= _MAX_ROWS:
        return F.linear(x, weight, bias)
    products = torch.bmm(x.expand(blocks.shape[0], -1, -1), blocks)  # [out / 32, T, 32]
    result = products.transpose(0, 1).reshape(num_rows, -1)
    if result.shape[1] != weight.shape[0]:
        result = result[:, : weight.shape[0]]
    return result if bias is None else result + bias

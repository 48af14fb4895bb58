"""Autotuning of each layer's product at start-up: the library's or one of our kernels, by number of rows.

A measurement, because none is the fastest everywhere: it depends on the weight's shape, on the number of rows and on
the chip. Layers of the same role (all down projections, say) choose together, and their weights are multiplied one
after the other, so that none is found in a cache. What is measured is the device's time, from a CUDA graph, because
that is how decode steps run. On the CPU, and where results may not depend on the load, nothing is measured: the choice
is fixed.

With several ranks, rank 0 measures and tells: equal steps must take equally long everywhere, and a rank that rounds
otherwise than its neighbour would be hard to understand.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neuron.engine import kernels
from neuron.engine.errors import is_device_fault
from neuron.engine.gemm.gemm import BySize, LibraryProduct, Product, SplitProduct, VectorProduct
from neuron.engine.layers.embedding import LMHead
from neuron.engine.layers.linear import LinearLayer
from neuron.engine.parallel.group import ParallelGroup
from neuron.engine.quantization.unquantized import UnquantizedWeight

logger = logging.getLogger(__name__)

Work = Callable[[], object]
# Device seconds of one run of a piece of work.
Measure = Callable[[Work], float]

# Numbers of rows that are measured; a step takes the choice of the next larger one, and the library beyond.
BUCKETS = (1, 2, 4, 8, 16)
# Another way must be faster by this much: less is within what two measurements differ by.
_MIN_GAIN = 0.03
# A host's first load of a model compiles the candidates; later ones find them on disk and take less than a second.
_BUDGET_S = 10.0
# Together larger than a GPU's cache.
_WORKING_SET_BYTES = 128 * 2**20
_MAX_LAYERS = 16
_CANDIDATES: tuple[type[LibraryProduct | VectorProduct | SplitProduct], ...] = (
    LibraryProduct,
    VectorProduct,
    SplitProduct,
)


@dataclass(frozen=True, slots=True)
class Role:
    """Layers that choose together. name: their path without the number of their layer."""

    name: str
    layers: tuple[LinearLayer | LMHead, ...]

    @property
    def weight(self) -> Tensor:
        return _weight(self.layers[0])


def _weight(layer: LinearLayer | LMHead) -> Tensor:
    if layer.weight is None:
        raise RuntimeError("products are chosen after the weights were loaded")
    return layer.weight


def roles_of(model: nn.Module) -> list[Role]:
    """The roles of a loaded model, in the order of its modules: the same on every rank."""
    found: dict[str, list[LinearLayer | LMHead]] = {}
    for path, module in model.named_modules():
        if isinstance(module, LMHead) or (
            isinstance(module, LinearLayer) and isinstance(module.weight_format, UnquantizedWeight)
        ):
            found.setdefault(re.sub(r"\.\d+(?=\.|$)", "", path), []).append(module)
    return [Role(name, tuple(layers)) for name, layers in found.items()]


def work_of(role: Role, product: Product, num_rows: int) -> tuple[Work, int]:
    """What is measured, and how many products it is: a step's products of one role, each with another weight."""
    weight = role.weight
    num_layers = min(max(_WORKING_SET_BYTES // max(weight.numel() * weight.element_size(), 1), 1), _MAX_LAYERS)
    layers = role.layers[:num_layers]
    x = torch.randn(num_rows, weight.shape[1], device=weight.device, dtype=torch.float32).to(weight.dtype)

    def work() -> None:
        for layer in layers:
            bias = layer.bias if isinstance(layer, LinearLayer) else None
            if isinstance(layer, LinearLayer) and layer.is_gated:
                product.gated(x, _weight(layer), bias)
            else:
                product.linear(x, _weight(layer), bias)

    return work, len(layers)


def fastest(seconds: Mapping[int, float]) -> int:
    """The candidate to take, of those measured (by their index): the first, unless another one is clearly faster."""
    best = min(seconds, key=lambda index: seconds[index])
    return best if seconds[best] < (1.0 - _MIN_GAIN) * seconds.get(0, float("inf")) else 0


def measure_choices(
    roles: Sequence[Role],
    measure: Measure,
    *,
    candidates: Sequence[Product],
    budget_s: float = _BUDGET_S,
    clock: Callable[[], float] = time.perf_counter,
) -> list[int]:
    """Indexes into `candidates` for each role and bucket, role by role. The first candidate is what stays without a
    measurement: where others do not take so many rows, fail, or where the time is up, which is spent on the largest
    weights first. Raises what leaves the device unusable."""
    deadline = clock() + budget_s
    choices = [0] * (len(roles) * len(BUCKETS))
    for position, role in sorted(enumerate(roles), key=lambda item: -item[1].weight.numel()):
        for column, rows in enumerate(BUCKETS):
            seconds: dict[int, float] = {}
            able = [i for i, product in enumerate(candidates) if rows <= getattr(product, "max_rows", rows)]
            if len(able) > 1 and clock() < deadline:
                for index in able:
                    try:
                        work, num_products = work_of(role, candidates[index], rows)
                        seconds[index] = measure(work) / num_products
                    except Exception as exc:
                        if is_device_fault(exc):
                            raise
                        logger.warning("%s cannot be used for %s: %s", candidates[index].name, role.name, exc)
            choices[position * len(BUCKETS) + column] = fastest(seconds) if seconds else 0
    return choices


def agree(choices: list[int], num_choices: int, group: ParallelGroup, device: torch.device) -> list[int]:
    """Rank 0's choices, on every rank. choices: this rank's, empty on other ranks than 0."""
    if group.world_size == 1:
        return choices
    own = torch.zeros(num_choices, dtype=torch.int64, device=device)
    if group.rank == 0:
        own.copy_(torch.tensor(choices, dtype=torch.int64))
    agreed: list[int] = group.all_gather(own)[:num_choices].tolist()
    return agreed


def apply_choices(roles: Sequence[Role], choices: Sequence[int], candidates: Sequence[Product]) -> str:
    """Give each layer its products; returns what was chosen, in one line."""
    words = []
    for position, role in enumerate(roles):
        chosen = choices[position * len(BUCKETS) : (position + 1) * len(BUCKETS)]
        table = [(rows, candidates[index]) for rows, index in zip(BUCKETS, chosen, strict=True)]
        for layer in role.layers:
            layer.product = BySize(table, candidates[0]) if any(chosen) else candidates[0]
        words.append(f"{role.name} " + " ".join(f"{rows}:{product.name}" for rows, product in table))
    return "; ".join(words)


def choose_products(model: nn.Module, group: ParallelGroup, device: torch.device) -> None:
    """Measure, agree, apply, and say so; once, after loading. All ranks of a group call it together.

    Does nothing where our kernels do not run.
    """
    if not kernels.is_available(device):
        return
    began = time.perf_counter()
    roles = roles_of(model)
    candidates: list[Product] = [candidate() for candidate in _CANDIDATES]
    choices: list[int] = []
    if group.rank == 0:
        with torch.inference_mode():
            choices = measure_choices(roles, device_seconds, candidates=candidates)
    choices = agree(choices, len(roles) * len(BUCKETS), group, device)
    summary = apply_choices(roles, choices, candidates)
    logger.info("products by number of rows, measured in %.2f s: %s", time.perf_counter() - began, summary)


def device_seconds(work: Work) -> float:
    """Device time of `work`, of the best of three replays of a CUDA graph."""
    # Compiles. On the stream that there is: cuBLAS keeps a workspace of 32 MiB for every stream it has seen.
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    graph.replay()
    seconds: list[float] = []
    for _ in range(3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return min(seconds)

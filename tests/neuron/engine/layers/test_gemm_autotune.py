"""The start-up choice of products, with a clock and a stopwatch that tell what a test wants."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from neuron.engine.gemm.gemm import BySize, LibraryProduct, Product
from neuron.engine.kernels import KernelUnsupported
from neuron.engine.layers import gemm_autotune
from neuron.engine.layers.gemm_autotune import BUCKETS, agree, apply_choices, fastest, measure_choices, roles_of
from neuron.engine.models.registry import build_model
from neuron.engine.parallel.group import ParallelGroup
from neuron.engine.weights.dummy import load_dummy_weights
from torch import Tensor, nn

CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 61,
    "tie_word_embeddings": True,
}


class Timed(LibraryProduct):
    """A product that takes the time it is told to: seconds by number of rows."""

    def __init__(self, name: str, seconds: dict[int, float], *, max_rows: int = 10**9, fails: bool = False) -> None:
        super().__init__()
        self.name = name
        self.max_rows = max_rows
        self.fails = fails
        self.seconds = seconds
        self.calls: list[tuple[int, int]] = []

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.fails:
            raise KernelUnsupported("7 rows")
        self.calls.append((x.shape[0], weight.shape[0]))
        return super().linear(x, weight, bias)


class Stopwatch:
    def __init__(self, candidates: list[Timed]) -> None:
        self.candidates = candidates

    def __call__(self, work: Any) -> float:
        for candidate in self.candidates:
            candidate.calls.clear()
        work()
        (used,) = [candidate for candidate in self.candidates if candidate.calls]
        return sum(used.seconds.get(rows, 1.0) for rows, _ in used.calls)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    built = build_model(CONFIG, device=torch.device("cpu"), dtype=torch.float32)
    load_dummy_weights(built)
    return built


def test_layers_of_one_role_choose_together(model: nn.Module) -> None:
    roles = {role.name: len(role.layers) for role in roles_of(model)}
    assert roles == {
        "layers.attention.qkv_proj": 3,
        "layers.attention.o_proj": 3,
        "layers.mlp.gate_up_proj": 3,
        "layers.mlp.down_proj": 3,
        "lm_head": 1,
    }


def test_the_fastest_of_those_that_take_so_many_rows(model: nn.Module) -> None:
    library = Timed("library", {1: 2.0, 2: 2.0, 4: 2.0, 8: 2.0, 16: 2.0})
    vector = Timed("vector", {1: 1.0, 2: 1.2, 4: 2.5}, max_rows=4)
    split = Timed("split", {1: 1.1, 2: 1.1, 4: 1.2, 8: 1.5, 16: 1.99})
    candidates = [library, vector, split]
    roles = roles_of(model)
    choices = measure_choices(roles, Stopwatch(candidates), candidates=candidates, budget_s=60)
    assert choices == [1, 2, 2, 2, 0] * len(roles)  # 1.99 is not clearly faster than 2.0


def test_what_is_multiplied_is_each_layers_own_weight(model: nn.Module) -> None:
    product = Timed("library", {})
    role = next(role for role in roles_of(model) if role.name.endswith("gate_up_proj"))
    work, num_products = gemm_autotune.work_of(role, product, 4)
    work()
    assert num_products == 3
    assert product.calls == [(4, 48)] * 3


def test_a_candidate_that_fails_is_left_out_and_named(model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    library, broken = Timed("library", {}), Timed("split", {}, fails=True)
    with caplog.at_level(logging.WARNING):
        choices = measure_choices(
            roles_of(model), Stopwatch([library, broken]), candidates=[library, broken], budget_s=60
        )
    assert set(choices) == {0}
    assert "split cannot be used for layers.mlp.down_proj: 7 rows" in caplog.text


def test_when_the_time_is_up_the_rest_stays_with_the_library(model: nn.Module) -> None:
    """Largest weights first: here the head's, which is last in the model."""
    library, ours = Timed("library", dict.fromkeys(BUCKETS, 2.0)), Timed("ours", dict.fromkeys(BUCKETS, 1.0))
    now = iter(range(1000))
    choices = measure_choices(
        roles_of(model), Stopwatch([library, ours]), candidates=[library, ours], budget_s=len(BUCKETS) + 0.5,
        clock=lambda: float(next(now)),
    )  # fmt: skip
    by_role = [choices[i : i + len(BUCKETS)] for i in range(0, len(choices), len(BUCKETS))]
    sizes = [role.weight.numel() for role in roles_of(model)]
    largest = sizes.index(max(sizes))
    assert by_role[largest] == [1] * len(BUCKETS)
    assert all(not any(chosen) for index, chosen in enumerate(by_role) if index != largest)


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({0: 1.0}, 0),
        ({0: 1.0, 1: 0.98}, 0),
        ({0: 1.0, 1: 0.9, 2: 0.95}, 1),
        ({1: 3.0, 2: 2.0}, 2),
        ({0: 1.0, 1: 9.0}, 0),
    ],
)
def test_fastest(seconds: dict[int, float], chosen: int) -> None:
    assert fastest(seconds) == chosen


def test_steps_between_two_measured_sizes_take_the_larger_ones_choice(model: nn.Module) -> None:
    candidates: list[Product] = [Timed("library", {}), Timed("vector", {}), Timed("split", {})]
    roles = roles_of(model)
    summary = apply_choices(roles, [1, 1, 2, 2, 0] * len(roles), candidates)
    assert "lm_head 1:vector 2:vector 4:split 8:split 16:library" in summary
    product = roles[0].layers[0].product
    assert isinstance(product, BySize)
    names = [product.of(rows).name for rows in (1, 2, 3, 4, 5, 8, 9, 16, 17, 5000)]
    assert names == ["vector"] * 2 + ["split"] * 4 + ["library"] * 4


def test_ranks_take_rank_zeros_choices() -> None:
    class Group(ParallelGroup):
        """Rank 1 of two; rank 0 has sent its part."""

        def all_gather(self, x: Tensor, sizes: object = None) -> Tensor:
            assert not x.any()
            return torch.cat([torch.tensor([2, 0, 1]), x])

    assert agree([], 3, Group(1, 2), torch.device("cpu")) == [2, 0, 1]
    assert agree([1, 1], 2, ParallelGroup.single(), torch.device("cpu")) == [1, 1]


def test_nothing_is_measured_on_the_cpu(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm_autotune, "measure_choices", None)
    gemm_autotune.choose_products(model, ParallelGroup.single(), torch.device("cpu"))

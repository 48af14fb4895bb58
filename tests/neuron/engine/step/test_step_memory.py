"""Whether a step fits, on a CPU whose free memory the test decides."""

from __future__ import annotations

import pytest
import torch
from neuron.checkpoint.config import read_config
from neuron.checkpoint.layout import rank_sizes
from neuron.checkpoint.sharding import RankOf
from neuron.engine.step import step_memory
from neuron.engine.step.step_memory import StepMemory

CPU = torch.device("cpu")
CONFIG = read_config(
    {
        "model_type": "llama",
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
)
FLOOR = 64 * 2**20


def memory(world_size: int = 1) -> StepMemory:
    return StepMemory(rank_sizes(CONFIG, RankOf()), dtype=torch.float32, device=CPU, world_size=world_size)


def leave_free(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr(step_memory, "available_host_bytes", lambda: FLOOR + num_bytes)


def test_what_fits_is_answered_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    here = memory()
    leave_free(monkeypatch, 512 * here.bytes_per_token + 3 * here.bytes_per_row)
    assert here.max_tokens(512, 3) == 512


def test_what_does_not_fit_is_answered_with_the_largest_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    here = memory()
    leave_free(monkeypatch, 100 * here.bytes_per_token + 3 * here.bytes_per_row)
    assert here.max_tokens(512, 3) == 100
    leave_free(monkeypatch, 2 * here.bytes_per_row)
    assert here.max_tokens(512, 3) == 0


def test_ranks_on_one_host_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    here = memory(world_size=2)
    leave_free(monkeypatch, 2 * (100 * here.bytes_per_token + here.bytes_per_row))
    assert here.max_tokens(512, 1) == 100


def test_the_host_keeps_a_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_memory, "available_host_bytes", lambda: FLOOR)
    assert memory().max_tokens(1, 1) == 0


def test_the_estimate_covers_what_a_forward_pass_holds_at_once() -> None:
    """The residual, its norm, gate and up, their product and the block's output: the least there is at one time."""
    assert memory().bytes_per_token >= 4 * (3 * 64 + 3 * 256)
    assert memory().bytes_per_row >= 4 * 1000

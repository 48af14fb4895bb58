"""Steps before the first request: of every kind, within every limit, and without a trace."""

from __future__ import annotations

import pytest
import torch
from neuron.engine.attention.interface import StepBatch
from neuron.engine.step.warm_up import every_variant

from tests.neuron.engine.toy import ToyModel, request, run, toy_engine

LIMITS = [
    {"max_step_tokens": 32, "max_running": 8, "max_model_len": 200},
    {"max_step_tokens": 64, "max_running": 40, "max_model_len": 3000},
    {"max_step_tokens": 24, "max_running": 24, "max_model_len": 40},
    {"max_step_tokens": 1, "max_running": 1, "max_model_len": 2},
]


@pytest.mark.parametrize("limits", LIMITS)
def test_steps_of_every_kind_within_the_limits(limits: dict[str, int]) -> None:
    seen: list[tuple[int, tuple[int, ...], int]] = []  # (decodes, lengths of the queries, longest context)

    def see(batch: StepBatch) -> None:
        lengths = tuple(batch.query_lens_host)
        seen.append((batch.num_decodes, lengths, int(batch.context_lens.max())))

    model = ToyModel()
    model.on_forward = see
    engine = toy_engine(model, **limits)
    every_variant(engine._runner, **limits)

    for _, lengths, longest in seen:
        assert len(lengths) <= limits["max_running"]
        assert sum(lengths) <= limits["max_step_tokens"]
        assert longest <= limits["max_model_len"]
    decodes = {num_decodes for num_decodes, lengths, _ in seen if num_decodes == len(lengths)}
    assert {*range(1, min(16, limits["max_running"]) + 1), limits["max_running"]} <= decodes
    if limits["max_step_tokens"] > 3:
        assert any(0 < num_decodes < len(lengths) for num_decodes, lengths, _ in seen), "decodes beside a prompt"
        assert any(num_decodes == 0 and longest == 2 for num_decodes, _, longest in seen), "prompts from their start"
        behind = [longest for num_decodes, _, longest in seen if num_decodes == 0 and longest > 2]
        assert behind and max(behind) > min(limits["max_model_len"] - 2, 2048) - 16, "a chunk behind a long context"


def test_nothing_of_it_stays() -> None:
    limits = LIMITS[0]
    engine = toy_engine(**limits)
    every_variant(engine._runner, **limits)
    assert not torch.count_nonzero(engine._runner.kv.layer(0)) and not torch.count_nonzero(engine._runner.kv.layer(1))
    assert engine.check() == []
    prompts = [request(number, range(number + 1, 30), 12) for number in range(4)]
    fresh = toy_engine(**limits)
    assert run(engine, *prompts).tokens == run(fresh, *prompts).tokens

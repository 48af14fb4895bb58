"""The plan of a step: who computes what, made on the device."""

from __future__ import annotations

import pytest
import torch
from neuron.engine.attention.attention_triton import TritonAttention
from torch import Tensor

from tests.kernels.attention.harness import attend, build, check


def test_padding_sequence_without_context_gives_zeros(device: torch.device) -> None:
    case = build(device, [(1, 20), (1, 0), (1, 0)], num_decodes=3)
    actual = attend(case)
    assert torch.equal(actual[1:], torch.zeros_like(actual[1:]))
    check(build(device, [(1, 20), (1, 0), (1, 0)], num_decodes=3))


def test_many_sequences_need_several_planner_chunks(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from neuron.engine.kernels.attention import attention_plan

    monkeypatch.setattr(attention_plan, "_PLAN_CHUNK", 16)
    chunks = [(1, 1 + 37 * index % 290) for index in range(37)]
    check(build(device, chunks, num_decodes=37, num_kv_heads=1, group=1, head_dim=64))


def test_plans_are_made_once_per_step_and_window(device: torch.device) -> None:
    case = build(device, [(1, 30), (20, 20)], num_decodes=1)
    backend = TritonAttention()
    backend.prepare(case.batch)

    def run(window: int | None) -> Tensor:
        return backend.forward(case.q, case.k, case.v, case.kv, case.batch, scale=case.scale, sliding_window=window)

    first = run(None)
    plans = dict(backend._plans)
    assert torch.equal(run(None), first)
    assert backend._plans == plans
    torch.testing.assert_close(run(8).cpu().double(), case.expected(window=8), rtol=0, atol=1e-5)
    assert len(backend._plans) == 2 * len(plans)
    backend.prepare(case.batch)
    assert not backend._plans

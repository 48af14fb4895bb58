"""The second pass: which tokens are kept, against the definition, and which is drawn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from neuron.engine.kernels.sampling import sampling
from neuron.engine.sampling.sampling_noise import noise_key
from neuron.protocol import SamplingParams

from tests.kernels.sampling.harness import VOCAB_SIZE, check, expected_tokens, normal, run


def test_untruncated_sampling(device: torch.device) -> None:
    params = [SamplingParams(temperature=t, seed=s) for s, t in enumerate([0.3, 1.0, 1.0, 2.5])]
    check(device, normal(4, 2.0), params)
    check(device, normal(4, 2.0), params, position=3)


@pytest.mark.parametrize("top_k", [2, 90, 128, 129, 700, VOCAB_SIZE - 1])
def test_top_k_beyond_what_a_program_holds(device: torch.device, top_k: int) -> None:
    """128 candidates fit here, and there are 94 groups: larger k take the halving passes."""
    params = [SamplingParams(temperature=t, top_k=top_k, seed=s) for s, t in enumerate([1.0, 3.0])]
    check(device, normal(2, 1.0), params)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
def test_top_p_of_flat_and_peaked_distributions(device: torch.device, top_p: float, scale: float) -> None:
    check(device, normal(2, scale), [SamplingParams(top_p=top_p, seed=s) for s in (1, 2)])


def test_the_kept_set_is_exactly_the_definition(device: torch.device) -> None:
    """Over many positions every token that may be drawn is drawn, and no other."""
    logits = torch.full((1, VOCAB_SIZE), -20.0)
    logits[0, [3, 400, 401, 900, 1499]] = torch.tensor([1.0, 0.9, 0.8, 0.7, 0.6])
    probabilities = torch.softmax(logits[0].double(), 0)
    cases = [
        (SamplingParams(top_k=3), {3, 400, 401}),
        (SamplingParams(top_p=float(probabilities[3] + probabilities[400]) + 1e-3), {3, 400, 401}),
        (SamplingParams(top_p=float(probabilities[3] + probabilities[400]) - 1e-3), {3, 400}),
        (SamplingParams(min_p=math.exp(-0.11)), {3, 400}),
        # top-p is of what top-k leaves.
        (SamplingParams(top_k=2, top_p=0.53), {3, 400}),
        (SamplingParams(top_k=2, top_p=0.52), {3}),
    ]
    for params, allowed in cases:
        rows = [
            SamplingParams(top_k=params.top_k, top_p=params.top_p, min_p=params.min_p, seed=seed) for seed in range(8)
        ]
        drawn = set(run(device, logits.expand(8, -1).contiguous(), rows).tokens.tolist())
        assert drawn == allowed, params


def test_equal_logits_at_the_border_all_stay(device: torch.device) -> None:
    logits = torch.full((10, VOCAB_SIZE), -30.0)
    logits[:, 100:104] = 1.0
    rows = [SamplingParams(top_k=2, seed=seed) for seed in range(10)]
    assert set(run(device, logits, rows).tokens.tolist()) == {100, 101, 102, 103}
    flat = torch.zeros(2, VOCAB_SIZE)
    tokens = run(device, flat, [SamplingParams(top_k=5, seed=1), SamplingParams(top_p=0.1, seed=2)]).tokens
    assert tokens.tolist() == expected_tokens(flat, [SamplingParams(seed=1), SamplingParams(seed=2)])


def test_frequencies_follow_the_probabilities(device: torch.device) -> None:
    """Chi-square over 200 draws of five tokens; the seeds are fixed, so the outcome is too."""
    logits = torch.full((1, 64), -1e4)
    weights = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
    logits[0, :5] = weights.log()
    keys = torch.tensor([noise_key(seed, 0) for seed in range(200)])
    ones = torch.ones(200, device=device)
    tokens = sampling.sample(
        logits.expand(200, -1).contiguous().to(device), ones, ones.int() * 0, ones, ones * 0, keys.to(device)
    ).tokens
    counts = np.bincount(tokens.cpu().numpy(), minlength=5)[:5]
    expected = weights.numpy() * 200
    assert ((counts - expected) ** 2 / expected).sum() < 13.3  # 1 % level, four degrees of freedom

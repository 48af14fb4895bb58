"""The sampling kernels together, against the engine's sampler, which works with sorts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from neuron.engine.errors import RequestError
from neuron.engine.kernels import KernelUnsupported
from neuron.engine.kernels.sampling import sampling
from neuron.engine.sampling.sampler import Sampler
from neuron.engine.scheduler.sequence import Sequence
from neuron.engine.scheduler.token_bias import TokenBias
from neuron.protocol import Generate, Logprobs, SamplingParams

from tests.kernels.sampling.harness import VOCAB_SIZE, check, expected_tokens, masks_of, normal, penalties_of, run


def test_rows_of_every_kind_in_one_batch(device: torch.device) -> None:
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(seed=1),
        SamplingParams(temperature=0.6, top_k=20, top_p=0.95, seed=2),
        SamplingParams(top_p=0.9, seed=3),
        SamplingParams(min_p=0.05, seed=4),
        SamplingParams(top_k=1, seed=5),
        SamplingParams(temperature=0.7, top_k=40, top_p=0.8, min_p=0.02, seed=6),
        SamplingParams(top_p=0.0, seed=7),
        SamplingParams(top_k=VOCAB_SIZE, top_p=1.0, seed=8),
    ]
    check(device, normal(len(params), 3.0), params)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_broken_row_is_flagged_and_harms_no_other(device: torch.device, poison: float) -> None:
    logits = normal(6, 2.0)
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(seed=1),
        SamplingParams(top_k=10, top_p=0.9, seed=2),
    ] * 2
    healthy = expected_tokens(logits[3:], params[3:])
    logits[0, 5] = logits[1, VOCAB_SIZE - 1] = logits[2, 700] = poison
    rows = run(device, logits, params)
    assert rows.finite.tolist() == [False] * 3 + [True] * 3
    assert rows.tokens[3:].tolist() == healthy
    assert ((rows.tokens >= 0) & (rows.tokens < VOCAB_SIZE)).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:divide by zero")
def test_a_row_without_any_token_is_flagged(device: torch.device) -> None:
    logits = torch.full((3, VOCAB_SIZE), -math.inf)
    rows = run(device, logits, [SamplingParams(temperature=0.0), SamplingParams(), SamplingParams(top_k=3)])
    assert not rows.finite.any()
    assert ((rows.tokens >= 0) & (rows.tokens < VOCAB_SIZE)).all()


def test_a_row_does_not_depend_on_its_neighbours(device: torch.device) -> None:
    logits = normal(3, 2.0)
    params = [SamplingParams(top_p=0.9, seed=seed) for seed in range(3)]
    together = run(device, logits, params)
    for row in range(3):
        alone = run(device, logits[row : row + 1], params[row : row + 1])
        assert alone.tokens[0] == together.tokens[row]
        assert alone.logprobs[0] == together.logprobs[row]


def test_masks_by_row_beside_rows_without_one(device: torch.device) -> None:
    logits = normal(4, 2.0)
    params = [SamplingParams(temperature=0.0), SamplingParams(seed=1), SamplingParams(seed=2), SamplingParams(seed=3)]
    allowed = [[VOCAB_SIZE - 1], None, [31, 32, 900], []]
    rows = run(device, logits.to(device, copy=True), params, masks=masks_of(device, allowed))
    assert rows.tokens[0] == VOCAB_SIZE - 1
    assert rows.tokens[1].item() == expected_tokens(logits, params)[1]
    assert rows.tokens[2] in (31, 32, 900)
    assert rows.tokens[3] == 0  # nothing is allowed
    assert rows.finite.all()
    exact = torch.log_softmax(logits.double(), dim=-1).gather(1, rows.tokens.cpu()[:, None])[:3, 0]
    torch.testing.assert_close(rows.logprobs[:3].cpu().double(), exact, rtol=0, atol=2e-5)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_poisoned_logit_is_seen_behind_a_mask_and_a_penalty(device: torch.device, poison: float) -> None:
    logits = normal(2, 2.0)
    logits[0, 700] = poison
    params = [SamplingParams(temperature=0.0, logit_bias={700: -100.0})] * 2
    listed = penalties_of(device, [TokenBias(p, [], []) for p in params])
    rows = run(device, logits.to(device), params, penalties=listed, masks=masks_of(device, [[1, 2]] * 2))
    assert rows.finite.tolist() == [False, True]


def test_real_sizes_once(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary of 32,000 with the structures that ship."""
    monkeypatch.undo()
    if device.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    params = [SamplingParams(temperature=0.6, top_k=20, top_p=0.95, seed=1), SamplingParams(top_p=0.95, seed=2)]
    check(device, normal(2, 2.0, vocab_size=32000), params)


def test_strided_rows_and_refusals(device: torch.device) -> None:
    wide = normal(2, 2.0, vocab_size=2 * VOCAB_SIZE)
    check(device, wide[:, :VOCAB_SIZE], [SamplingParams(top_k=5, seed=1), SamplingParams(temperature=0.0)])
    with pytest.raises(KernelUnsupported, match="strides"):
        run(device, normal(VOCAB_SIZE, 1.0, vocab_size=2).T, [SamplingParams()] * 2)
    assert run(device, normal(1, 1.0)[:0], []).tokens.shape == (0,)


def test_the_engines_sampler_draws_the_same_through_the_kernel(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = [
        SamplingParams(temperature=0.0, logprobs=2),
        SamplingParams(temperature=0.8, top_p=0.9, seed=1, logprobs=0),
        SamplingParams(temperature=1.0, logit_bias={7: 100.0}, seed=2),
        SamplingParams(temperature=0.6, top_k=20, top_p=0.95, presence_penalty=1.0, seed=3),
        SamplingParams(temperature=0.6, top_p=0.95, seed=4, logprobs=1),
        SamplingParams(temperature=0.6, top_p=0.95, seed=5),
    ]
    logits = normal(len(params), 2.0)
    logits[5, 77] = math.nan

    class FirstThousand:
        """Stands in for a grammar."""

        def fill_mask(self, mask: npt.NDArray[np.int32]) -> None:
            mask[32:] = 0

    def draw() -> list[tuple[int, Logprobs | None]]:
        sequences = [Sequence(Generate(row, [1], p, 99), row) for row, p in enumerate(params)]
        for sequence in sequences:
            if TokenBias.is_needed(sequence.sampling):
                sequence.bias = TokenBias(sequence.sampling, [1], [])
        for row in (4, 5):
            sequences[row].grammar = FirstThousand()  # type: ignore[assignment]
        sampled = Sampler(VOCAB_SIZE, device).sample(logits.to(device, copy=True), sequences)
        assert all(row.error is None for row in sampled[:5])
        assert isinstance(sampled[5].error, RequestError)
        assert sampled[5].error.health is not None
        assert sampled[5].error.health.nan == 1
        return [(row.token, row.logprobs) for row in sampled[:5]]

    from neuron.engine.kernels.sampling.logsumexp import log_totals

    kernels: dict[str, Any] = {"sample": sampling.sample, "log_totals": log_totals}
    monkeypatch.setattr("neuron.engine.sampling.sampler.fused_kernel", lambda *_: None)
    expected = draw()
    monkeypatch.setattr("neuron.engine.sampling.sampler.fused_kernel", lambda _, name, __: kernels[name])
    for (token, logprobs), (expected_token, expected_logprobs) in zip(draw(), expected, strict=True):
        assert token == expected_token
        assert (logprobs is None) == (expected_logprobs is None)
        if logprobs is not None and expected_logprobs is not None:
            assert logprobs.top_ids == expected_logprobs.top_ids
            assert logprobs.logprob == pytest.approx(expected_logprobs.logprob, abs=1e-5)
    assert expected[2][0] == 7
    assert expected[4][0] < 1024

"""The first pass over the logits: noise, penalties, masks, and each group's best."""

from __future__ import annotations

import pytest
import torch
from neuron.engine.sampling.sampler import Sampler
from neuron.engine.sampling.sampling_noise import log_exponential_noise, noise_key
from neuron.engine.scheduler.sequence import Sequence
from neuron.engine.scheduler.token_bias import TokenBias
from neuron.protocol import Generate, SamplingParams

from tests.kernels.sampling.harness import VOCAB_SIZE, check, masks_of, normal, penalties_of, run


def test_noise_is_the_engines_noise(device: torch.device) -> None:
    """The same integers bit for bit; the floats within a few units in the last place, at both ends of the range."""
    from tests.kernels.noise_probe import noise_kernel

    size = 2048
    keys = torch.tensor([noise_key(0, 0), noise_key(2**63 + 7, 12345), noise_key(1, 2**31), -1])
    tokens = torch.cat([torch.arange(size - 8), torch.arange(151928, 151936)])
    out = torch.empty(len(keys), size, device=device)
    noise_kernel[(len(keys),)](out, keys.to(device), tokens.to(device), SIZE=size)
    expected = log_exponential_noise(keys, tokens)
    torch.testing.assert_close(out.cpu(), expected, rtol=3e-6, atol=3e-6)


def test_greedy_takes_the_first_of_equal_tokens(device: torch.device) -> None:
    logits = normal(3, 1.0)
    logits[0, 700] = logits[0, 1400] = 50.0
    logits[1, 0] = 50.0
    logits[2, VOCAB_SIZE - 1] = 50.0
    check(device, logits, [SamplingParams(temperature=0.0)] * 3)


def test_best_tokens_in_one_group(device: torch.device) -> None:
    """Correlated ids: the k best tokens are neighbours, so group maxima say little about them."""
    logits = normal(3, 0.1)
    logits[:, 512:640] += torch.linspace(5, 6, 128)
    params = [
        SamplingParams(top_k=20, seed=1),
        SamplingParams(top_k=100, top_p=0.7, seed=2),
        SamplingParams(top_p=0.6, seed=3),
    ]
    check(device, logits, params)


def test_masked_tokens_are_never_drawn(device: torch.device) -> None:
    """A grammar leaves few tokens, fewer than top_k asks for."""
    logits = normal(6, 1.0)
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=5.0, seed=1),
        SamplingParams(temperature=5.0, top_k=50, seed=2),
        SamplingParams(temperature=5.0, top_p=0.99, seed=3),
        SamplingParams(temperature=5.0, top_k=300, top_p=0.999, min_p=1e-9, seed=4),
        SamplingParams(temperature=5.0, min_p=1e-9, seed=5),
    ]
    rows = run(device, logits, params, masks=masks_of(device, [list(range(7))] * 6))
    assert (rows.tokens < 7).all()
    assert rows.finite.all()
    assert torch.isfinite(rows.logprobs).all()


PENALISED = [
    SamplingParams(seed=1, repetition_penalty=1.7, presence_penalty=0.4, frequency_penalty=0.3),
    SamplingParams(seed=2),
    SamplingParams(temperature=0.0, frequency_penalty=1.5, logit_bias={700: 2.0, 5: -100.0}),
    SamplingParams(seed=3, top_p=0.8, repetition_penalty=0.6, logit_bias={VOCAB_SIZE - 1: 3.0}),
    SamplingParams(seed=4, top_k=15, presence_penalty=-1.0, logit_bias=dict.fromkeys(range(0, 900, 2), 1.0)),
]
PROMPT = [3, 3, 700, 255, 256, VOCAB_SIZE - 1]
OUTPUT = [700, 5, 5, 5, 1200, 700]


def biases_of(params: list[SamplingParams], output: list[int]) -> list[TokenBias | None]:
    return [TokenBias(p, PROMPT, output) if TokenBias.is_needed(p) else None for p in params]


def biased_sequences(params: list[SamplingParams], output: list[int]) -> list[Sequence]:
    sequences = [Sequence(Generate(row, PROMPT, p, 99, output_ids=tuple(output)), row) for row, p in enumerate(params)]
    for sequence, bias in zip(sequences, biases_of(params, output), strict=True):
        sequence.bias = bias
    return sequences


def test_penalties_and_bias_are_those_of_the_engine(device: torch.device) -> None:
    """Tokens, the logits that are left behind, and log-probabilities of what the model said before."""
    logits = normal(len(PENALISED), 2.0)
    expected_logits = logits.clone()
    expected = Sampler(VOCAB_SIZE, torch.device("cpu")).sample(expected_logits, biased_sequences(PENALISED, OUTPUT))
    actual_logits = logits.to(device, copy=True)
    listed = penalties_of(device, biases_of(PENALISED, OUTPUT))
    actual = run(device, actual_logits, PENALISED, len(OUTPUT), penalties=listed)
    assert actual.tokens.tolist() == [row.token for row in expected]
    torch.testing.assert_close(actual_logits.cpu(), expected_logits, rtol=0, atol=2e-6)
    exact = torch.log_softmax(logits.double(), dim=-1).gather(1, actual.tokens.cpu()[:, None])[:, 0]
    torch.testing.assert_close(actual.logprobs.cpu().double(), exact, rtol=0, atol=2e-5)


@pytest.mark.parametrize("pending", [700, 1200, 3, 42, VOCAB_SIZE - 1, -1])
def test_a_pending_token_counts_as_if_it_were_listed(device: torch.device, pending: int) -> None:
    """In the output already, in the prompt only, nowhere yet, in the last tile, none: the same bits either way."""
    logits = normal(len(PENALISED), 2.0)
    later = logits.to(device, copy=True)
    now = logits.to(device, copy=True)
    rows = len(PENALISED)
    ahead = penalties_of(device, biases_of(PENALISED, OUTPUT), [pending] * rows)
    behind = penalties_of(device, biases_of(PENALISED, OUTPUT + [pending] * (pending >= 0)))
    first = run(device, later, PENALISED, penalties=ahead)
    second = run(device, now, PENALISED, penalties=behind)
    assert torch.equal(later, now)
    assert torch.equal(first.tokens, second.tokens)
    assert torch.equal(first.logprobs, second.logprobs)


def test_a_pending_tokens_logprob_is_of_the_models_logits(device: torch.device) -> None:
    logits = normal(1, 1.0)
    logits[0, 42] = 30.0
    params = [SamplingParams(temperature=0.0, presence_penalty=2.0)]
    rows = run(device, logits.clone(), params, penalties=penalties_of(device, [TokenBias(params[0], [1], [7])], [42]))
    assert rows.tokens.tolist() == [42]
    exact = torch.log_softmax(logits.double(), dim=-1)[0, 42].item()
    assert rows.logprobs.item() == pytest.approx(exact, abs=2e-5)

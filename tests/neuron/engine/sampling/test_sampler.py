from __future__ import annotations

import math

import pytest
import torch
from neuron.engine.sampling.sampler import Sampler, token_logprobs
from neuron.engine.sampling.sampling_noise import log_exponential_noise, noise_key
from neuron.engine.scheduler.sequence import Sequence
from neuron.engine.scheduler.token_bias import TokenBias
from neuron.protocol import Generate, SamplingParams
from torch import Tensor

CPU = torch.device("cpu")


def sequence(sampling: SamplingParams, prompt: list[int] | None = None, output: tuple[int, ...] = ()) -> Sequence:
    item = Sequence(
        Generate(request_id=0, prompt_ids=prompt or [0], sampling=sampling, max_tokens=100, output_ids=output), 0
    )
    if TokenBias.is_needed(sampling):
        item.bias = TokenBias(sampling, prompt or [0], output)
    return item


def random_logits(rows: int, vocab: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def reference_probabilities(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """The distribution of one row [V], by sorting: temperature, top-k, top-p of the rest, min-p."""
    scaled = logits.double() / sampling.temperature
    order = scaled.argsort(descending=True)
    within_k = torch.zeros_like(scaled, dtype=torch.bool)
    within_k[order[: sampling.top_k or len(order)]] = True
    ordered = scaled.masked_fill(~within_k, -math.inf).softmax(-1)[order]
    keep = within_k.clone()
    if sampling.top_p < 1.0:
        keep[order[1:]] &= (ordered.cumsum(-1) - ordered)[1:] < sampling.top_p
    keep &= scaled.softmax(-1) >= sampling.min_p * scaled.softmax(-1).max()
    return scaled.masked_fill(~keep, -math.inf).softmax(-1)


# ---------------------------------------------------------------------- noise


def test_noise_is_a_pure_function_of_seed_position_and_token():
    ids = torch.arange(500)
    keys = torch.tensor([noise_key(7, 0), noise_key(7, 1), noise_key(8, 0), noise_key(-3, 2**40)])
    whole = log_exponential_noise(keys, ids)
    assert torch.equal(whole[2:3, 100:200], log_exponential_noise(keys[2:3], ids[100:200]))
    picked = torch.tensor([[3, 499], [0, 7], [11, 12], [5, 5]])
    assert torch.equal(log_exponential_noise(keys, picked), whole.gather(1, picked))
    assert len({tuple(row) for row in whole.tolist()}) == 4


def test_noise_words_are_splitmix64():
    """The published test vector of SplitMix64 with state 1234567, reached through token ids as the stream index."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    log_e = log_exponential_noise(torch.tensor([1234567]), torch.arange(3))[0]
    for word, value in zip(expected, log_e.tolist(), strict=True):
        uniform = ((word >> 32) + 0.5) / 2**32
        assert value == pytest.approx(math.log(-math.log1p(-uniform)), rel=1e-5)


def test_noise_is_exponential_and_uncorrelated():
    keys = torch.tensor([noise_key(seed, position) for seed in range(64) for position in range(8)])
    noise = log_exponential_noise(keys, torch.arange(400)).exp().double()
    assert torch.isfinite(noise).all()
    n = noise.numel()
    assert float(noise.mean()) == pytest.approx(1.0, abs=5 / math.sqrt(n))
    assert float(noise.var()) == pytest.approx(1.0, abs=15 / math.sqrt(n))
    assert float((noise < 0.01).double().mean()) == pytest.approx(1 - math.exp(-0.01), rel=0.05)
    centred = noise - 1
    for other in (centred.roll(1, 0), centred.roll(8, 0), centred.roll(1, 1)):
        assert abs(float((centred * other).mean())) < 5 / math.sqrt(n)


# ---------------------------------------------------------------------- distribution


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.6),
        SamplingParams(temperature=1.3, top_k=5),
        SamplingParams(temperature=1.0, top_p=0.7),
        SamplingParams(temperature=1.0, min_p=0.2),
        SamplingParams(temperature=1.5, top_k=9, top_p=0.8, min_p=0.05),
        SamplingParams(temperature=1.0, top_p=1e-9),
        SamplingParams(temperature=0.5, top_k=1),
    ],
)
def test_tokens_are_drawn_from_the_asked_distribution(sampling):
    logits = random_logits(1, 40, seed=3, spread=1.5)
    draws = 4000
    sequences = [
        sequence(
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                min_p=sampling.min_p,
                seed=seed,
            )
        )
        for seed in range(draws)
    ]
    sampled = Sampler(40, CPU).sample(logits.repeat(draws, 1), sequences)
    counts = torch.bincount(torch.tensor([item.token for item in sampled]), minlength=40).double()
    expected = reference_probabilities(logits[0], sampling)
    assert counts[expected == 0].sum() == 0, "a token was drawn that truncation forbids"
    # Pearson's chi-squared with cells of at least five expected draws; six standard deviations of leeway.
    cells = expected * draws >= 5
    statistic = float((((counts - expected * draws) ** 2) / (expected * draws))[cells].sum())
    freedom = int(cells.sum()) - 1
    assert statistic <= freedom + 6 * math.sqrt(2 * max(freedom, 1))


@pytest.mark.parametrize("vocab", [50, 1000, 20_000])
def test_truncation_finds_the_same_set_as_sorting(vocab):
    """Flat rows need far more candidates than are looked at first."""
    for spread in (0.01, 0.5, 3.0, 20.0):
        logits = random_logits(4, vocab, seed=vocab, spread=spread)
        for sampling in (
            SamplingParams(top_p=0.95),
            SamplingParams(top_p=0.5, top_k=vocab - 1),
            SamplingParams(min_p=0.1),
            SamplingParams(top_k=300, top_p=0.9),
        ):
            sequences = [
                sequence(SamplingParams(top_p=sampling.top_p, top_k=sampling.top_k, min_p=sampling.min_p, seed=row))
                for row in range(4)
            ]
            sampled = Sampler(vocab, CPU).sample(logits.clone(), sequences)
            for row, item in enumerate(sampled):
                probabilities = reference_probabilities(logits[row], sampling)
                noise = log_exponential_noise(torch.tensor([noise_key(row, 0)]), torch.arange(vocab))[0]
                best = (probabilities.log() - noise).argmax()
                assert item.token == int(best)


def test_a_row_does_not_depend_on_its_batch():
    logits = random_logits(12, 300)
    samplings = [
        SamplingParams(temperature=0.0),
        SamplingParams(seed=1),
        SamplingParams(seed=2, top_k=7),
        SamplingParams(seed=3, top_p=0.9, logprobs=2),
        SamplingParams(seed=4, repetition_penalty=1.3, presence_penalty=0.2),
        SamplingParams(temperature=0.0, logit_bias={3: 50.0}),
    ] * 2
    sequences = [sequence(sampling, [1, 2, 3], (5, 6)) for sampling in samplings]
    sampler = Sampler(300, CPU)
    alone = [sampler.sample(logits[row : row + 1].clone(), [item])[0] for row, item in enumerate(sequences)]
    together = sampler.sample(logits.clone(), sequences)
    assert [item.token for item in together] == [item.token for item in alone]
    order = torch.randperm(12).tolist()
    shuffled = sampler.sample(logits[order], [sequences[row] for row in order])
    assert [item.token for item in shuffled] == [alone[row].token for row in order]


def test_greedy_takes_the_first_best_and_tiny_temperatures_are_greedy():
    logits = random_logits(3, 64)
    expected = logits.argmax(-1).tolist()
    for sampling in (SamplingParams(temperature=0.0), SamplingParams(temperature=1e-6, seed=9, top_p=0.5)):
        sampled = Sampler(64, CPU).sample(logits.clone(), [sequence(sampling)] * 3)
        assert [item.token for item in sampled] == expected


# ---------------------------------------------------------------------- penalties, bias, log-probabilities


def test_penalties_and_bias_follow_their_definitions():
    prompt, output = [1, 2, 2, 3], (3, 4, 4, 4)
    sampling = SamplingParams(
        temperature=0.0,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        repetition_penalty=1.5,
        logit_bias={4: 0.25, 9: -2.0},
    )
    logits = random_logits(2, 12, seed=8)
    expected = logits[1].clone()
    for token in {*prompt, *output}:
        value = expected[token]
        expected[token] = value / 1.5 if value > 0 else value * 1.5
    for token in set(output):
        expected[token] -= 0.3 + 0.2 * output.count(token)
    expected[4] += 0.25
    expected[9] -= 2.0
    changed = logits.clone()
    whole = sequence(sampling, prompt, output)
    Sampler(12, CPU).sample(changed, [sequence(SamplingParams(temperature=0.0)), whole])
    assert torch.allclose(changed[1], expected, atol=1e-6)
    assert torch.equal(changed[0], logits[0])
    # Counted one by one they are the same as counted at a resume.
    grown = sequence(sampling, prompt)
    for token in output:
        grown.append(token, max_model_len=1000)
    again = logits.clone()
    Sampler(12, CPU).sample(again, [sequence(SamplingParams(temperature=0.0)), grown])
    assert torch.equal(again, changed)


def test_a_bias_of_a_hundred_forces_and_forbids():
    logits = random_logits(2, 30)
    best = int(logits[1].argmax())
    sampled = Sampler(30, CPU).sample(
        logits,
        [
            sequence(SamplingParams(seed=1, logit_bias={17: 100.0})),
            sequence(SamplingParams(temperature=0.0, logit_bias={best: -100.0})),
        ],
    )
    assert sampled[0].token == 17
    assert sampled[1].token != best


def test_log_probabilities_are_those_of_the_raw_distribution():
    logits = random_logits(3, 50, seed=2)
    expected = logits.double().log_softmax(-1)
    samplings = [
        SamplingParams(seed=1, temperature=0.3, top_k=3, logprobs=5, logit_bias={7: 30.0}),
        SamplingParams(temperature=0.0, logprobs=0),
        SamplingParams(temperature=0.0),
    ]
    sampled = Sampler(50, CPU).sample(logits.clone(), [sequence(sampling) for sampling in samplings])
    first = sampled[0].logprobs
    assert first is not None
    assert first.logprob == pytest.approx(float(expected[0, sampled[0].token]), abs=1e-5)
    assert first.top_ids == expected[0].topk(5).indices.tolist()
    assert first.top_logprobs == pytest.approx(expected[0].topk(5).values.tolist(), abs=1e-5)
    second = sampled[1].logprobs
    assert second is not None and second.top_ids == [] and second.top_logprobs == []
    assert sampled[2].logprobs is None


def test_more_log_probabilities_than_tokens_are_all_of_them():
    entry = token_logprobs(random_logits(1, 4), [2], [20])[0]
    assert sorted(entry.top_ids) == [0, 1, 2, 3]
    assert sum(math.exp(value) for value in entry.top_logprobs) == pytest.approx(1.0)


# ---------------------------------------------------------------------- broken rows


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("plain", [True, False])
def test_a_broken_row_is_reported_and_harms_no_other(value, plain):
    logits = random_logits(3, 20)
    expected = logits.argmax(-1).tolist()
    logits[1, 13] = value
    sampling = SamplingParams(temperature=0.0, logprobs=-1 if plain else 1)
    sampled = Sampler(20, CPU).sample(logits, [sequence(sampling)] * 3)
    assert sampled[1].error is not None and sampled[1].error.kind == "nan_logits"
    assert "of 20 logits; finite values from" in sampled[1].error.message
    assert [sampled[0].token, sampled[2].token] == [expected[0], expected[2]]
    assert sampled[0].error is None and sampled[2].error is None
    assert sampled[1].logprobs is None

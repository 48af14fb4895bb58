"""The sampling kernels against the engine's sampler, which works with sorts, and against their own definition."""

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
from neuron.engine.kernels.sampling.sampling_inputs import TokenMasks, TokenPenalties
from neuron.engine.sampling.sampler import Sampler
from neuron.engine.sampling.sampling_noise import log_exponential_noise, noise_key
from neuron.engine.scheduler.sequence import Sequence
from neuron.engine.scheduler.token_bias import TokenBias
from neuron.protocol import Generate, Logprobs, SamplingParams
from torch import Tensor

VOCAB_SIZE = 1500


@pytest.fixture(autouse=True)
def small_structures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small groups, tiles and candidate lists, so that a small vocabulary takes every path of a large one."""
    monkeypatch.setattr(sampling, "_TILE", 256)
    monkeypatch.setattr(sampling, "_MIN_GROUP", 16)
    monkeypatch.setattr(sampling, "_CAPACITY", 128)
    monkeypatch.setattr(sampling, "_FIRST_CANDIDATES", 32)
    monkeypatch.setattr(sampling, "_CHUNK", 256)
    monkeypatch.setattr(sampling, "_ENTRIES", 32)


def normal(rows: int, scale: float, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def run(
    device: torch.device, logits: Tensor, params: list[SamplingParams], position: int = 0, **changes: Any
) -> sampling.SampledRows:
    return sampling.sample(
        logits.to(device),
        torch.tensor([p.temperature for p in params], device=device),
        torch.tensor([p.top_k for p in params], dtype=torch.int32, device=device),
        torch.tensor([p.top_p for p in params], device=device),
        torch.tensor([p.min_p for p in params], device=device),
        torch.tensor([noise_key(p.seed, position) for p in params], device=device),
        **changes,
    )


def expected_tokens(logits: Tensor, params: list[SamplingParams], position: int = 0) -> list[int]:
    sequences = [
        Sequence(
            Generate(request_id=row, prompt_ids=[1], output_ids=tuple([1] * position), sampling=p, max_tokens=99), row
        )
        for row, p in enumerate(params)
    ]
    return [s.token for s in Sampler(logits.shape[1], torch.device("cpu")).sample(logits.clone(), sequences)]


def check(device: torch.device, logits: Tensor, params: list[SamplingParams], position: int = 0) -> None:
    actual = run(device, logits, params, position)
    assert actual.tokens.tolist() == expected_tokens(logits, params, position)
    assert actual.finite.all()
    exact = torch.log_softmax(logits.double(), dim=-1).gather(1, actual.tokens.cpu()[:, None])[:, 0]
    torch.testing.assert_close(actual.logprobs.cpu().double(), exact, rtol=0, atol=2e-5)


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


def test_untruncated_sampling(device: torch.device) -> None:
    params = [SamplingParams(temperature=t, seed=s) for s, t in enumerate([0.3, 1.0, 1.0, 2.5])]
    check(device, normal(4, 2.0), params)
    check(device, normal(4, 2.0), params, position=3)


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


@pytest.mark.parametrize("top_k", [2, 90, 128, 129, 700, VOCAB_SIZE - 1])
def test_top_k_beyond_what_a_program_holds(device: torch.device, top_k: int) -> None:
    """128 candidates fit here, and there are 94 groups: larger k take the halving passes."""
    params = [SamplingParams(temperature=t, top_k=top_k, seed=s) for s, t in enumerate([1.0, 3.0])]
    check(device, normal(2, 1.0), params)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
def test_top_p_of_flat_and_peaked_distributions(device: torch.device, top_p: float, scale: float) -> None:
    check(device, normal(2, scale), [SamplingParams(top_p=top_p, seed=s) for s in (1, 2)])


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


def masks_of(device: torch.device, allowed: list[list[int] | None], vocab_size: int = VOCAB_SIZE) -> TokenMasks:
    """Masks of the rows that are not None."""
    bits = np.zeros((len(allowed), -(-vocab_size // 32) * 32), dtype=np.uint8)
    for row, tokens in enumerate(allowed):
        bits[row, tokens or []] = 1
    kept = [row for row, tokens in enumerate(allowed) if tokens is not None]
    rows = torch.full((len(allowed),), -1, dtype=torch.int32)
    rows[kept] = torch.arange(len(kept), dtype=torch.int32)
    words = np.packbits(bits[kept], axis=-1, bitorder="little").view(np.int32)
    return TokenMasks(torch.from_numpy(words).to(device), rows.to(device))


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


def penalties_of(
    device: torch.device, biases: list[TokenBias | None], pending: list[int] | None = None
) -> TokenPenalties:
    parts = [None if bias is None else bias.counted() for bias in biases]
    columns = [np.concatenate([part[i] for part in parts if part is not None]) for i in range(3)]
    starts = np.cumsum([0, *(0 if part is None else len(part[0]) for part in parts)], dtype=np.int32)
    rates = [(0.0, 0.0, 1.0) if bias is None else bias.penalties for bias in biases]
    return TokenPenalties(
        torch.from_numpy(starts).to(device),
        *(torch.from_numpy(column.copy()).to(device) for column in columns),
        penalties=torch.tensor(rates).to(device),
        pending=None if pending is None else torch.tensor(pending, device=device),
    )


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


@pytest.mark.filterwarnings("ignore:divide by zero")
def test_log_totals_of_a_row_do_not_depend_on_the_others(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from neuron.engine.kernels.sampling import logsumexp

    monkeypatch.setattr(logsumexp, "_BLOCK", 256)
    logits = torch.cat([normal(3, 2.0), normal(1, 1.0) * 1e4, torch.full((1, VOCAB_SIZE), -math.inf)])
    logits[1, ::7] = -math.inf
    logits[2, 300:] = -math.inf
    wide = torch.cat([logits, logits], dim=1).to(device)[:, :VOCAB_SIZE]
    actual = logsumexp.log_totals(wide)
    expected = torch.logsumexp(logits.double(), dim=-1, keepdim=True)
    torch.testing.assert_close(actual[:4].cpu().double(), expected[:4], rtol=1e-6, atol=1e-5)
    assert actual[4].item() == -math.inf
    for row in range(5):
        assert torch.equal(logsumexp.log_totals(wide[row : row + 1]), actual[row : row + 1])
    assert logsumexp.log_totals(wide[:0]).shape == (0, 1)
    with pytest.raises(KernelUnsupported, match="strides"):
        logsumexp.log_totals(wide.T)

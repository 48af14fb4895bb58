"""Logits and parameters, sampled by the kernels and by the engine's sampler."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from neuron.engine.kernels.sampling import sampling
from neuron.engine.kernels.sampling.sampling_inputs import TokenMasks, TokenPenalties
from neuron.engine.sampling.sampler import Sampler
from neuron.engine.sampling.sampling_noise import noise_key
from neuron.engine.scheduler.sequence import Sequence
from neuron.engine.scheduler.token_bias import TokenBias
from neuron.protocol import Generate, SamplingParams
from torch import Tensor

VOCAB_SIZE = 1500


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

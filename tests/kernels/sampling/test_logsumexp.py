"""Totals of rows, for log-probabilities."""

from __future__ import annotations

import math

import pytest
import torch
from neuron.engine.kernels import KernelUnsupported

from tests.kernels.sampling.harness import VOCAB_SIZE, normal


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

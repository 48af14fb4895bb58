"""What other libraries are given, and which of them are there."""

from __future__ import annotations

import pytest
import torch
from neuron.engine.attention.attention_plugins import PLUGINS, installed_plugins, page_lists


def test_page_lists_are_the_tables_without_their_padding() -> None:
    tables = torch.tensor([[5, 0, 0], [2, 9, 4], [7, 8, 0]], dtype=torch.int32)
    indptr, indices, last = page_lists(tables, torch.tensor([16, 33, 31], dtype=torch.int32), 16)
    assert indptr.tolist() == [0, 1, 4, 6]
    assert indices.tolist() == [5, 2, 9, 4, 7, 8]
    assert last.tolist() == [16, 1, 15]


def test_what_is_not_installed_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neuron.engine.attention.attention_plugins.find_spec", lambda name: None)
    reasons: dict[str, str] = {}
    assert not list(installed_plugins(reasons.__setitem__))
    assert reasons.keys() == PLUGINS.keys()
    assert "flashinfer is not installed" in reasons.values()

"""Models that call tools, by the form that they write."""

from __future__ import annotations

import pytest
from neuron.daemon.prompt.model import TextModel

from tests.neuron.daemon.prompt.checkpoints import byte_level_json, load


@pytest.fixture(scope="module")
def spelled(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    """A model whose vocabulary has no markers: they are read in the text."""
    return load(tmp_path_factory.mktemp("spelled"), tokenizer_json=byte_level_json(()))


@pytest.fixture(params=["tokens", "text"])
def model(request: pytest.FixtureRequest, qwen: TextModel, spelled: TextModel) -> TextModel:
    return qwen if request.param == "tokens" else spelled

"""A checkpoint of a real architecture, written once."""

from __future__ import annotations

import pytest

from tests.neuron.engine.checkpoints import write_qwen3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_qwen3(tmp_path_factory.mktemp("qwen3"))

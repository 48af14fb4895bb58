from __future__ import annotations

from pathlib import Path

import pytest
from neuron.daemon.prompt.model import TextModel

from tests.neuron.daemon.prompt.checkpoints import load


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    return load(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="session")
def demo() -> TextModel:
    import neuron

    folder = Path(neuron.__file__).parent / "demo_model"
    if not (folder / "tokenizer.json").is_file():
        pytest.skip("the demo model's tokenizer is not there")
    return TextModel.load(folder)

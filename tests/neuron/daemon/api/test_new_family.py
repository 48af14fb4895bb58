"""A family of one class and one entry is preflighted, estimated, divided, loaded and served."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from cortex_core.errors import ApiError
from cortex_core.fleet import ModelSpec
from neuron.checkpoint.config import read_config
from neuron.checkpoint.families import FAMILIES
from neuron.checkpoint.folder import weight_paths
from neuron.checkpoint.layout import footprints, stored_tensors
from neuron.checkpoint.preflight import check_config
from neuron.daemon.lifecycle.inspection import inspect
from neuron.daemon.supervisor.process_group import worker_command
from neuron.engine.models.registry import build_model
from neuron.engine.parallel.group import ParallelGroup
from neuron.protocol import EngineConfig

from tests.neuron.daemon.api.harness import run_neuron
from tests.neuron.new_family import CONFIG, ENTRY, MODEL_TYPE, write_newcomer, write_sitecustomize

ROOT = Path(__file__).parents[4]


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(FAMILIES, MODEL_TYPE, ENTRY)
    return write_newcomer(tmp_path / "newcomer")


def test_without_its_entry_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ApiError) as caught:
        inspect(ModelSpec("file:/x"), write_newcomer(tmp_path / "newcomer"))
    assert caught.value.code == "unsupported_architecture" and MODEL_TYPE in caught.value.message


def test_it_is_preflighted_estimated_and_divided(checkpoint: Path) -> None:
    found = inspect(ModelSpec("file:/x"), checkpoint)
    assert found.model == read_config(CONFIG) and found.model.head_dim == 16
    for ranks in (1, 2):
        config = EngineConfig(model_id="m", path=str(checkpoint), tensor_parallel_size=ranks)
        estimated = footprints(config, found.model, stored_tensors(weight_paths(checkpoint)))
        for rank, footprint in enumerate(estimated):
            group = ParallelGroup(rank, ranks)
            model = build_model(CONFIG, device=torch.device("cpu"), dtype=torch.float32, parallel=group)
            held = sum(parameter.numel() * 4 for parameter in model.parameters())
            assert held * 0.97 <= footprint.weights <= held * 1.03
            assert footprint.kv_bytes_per_token == 2 * 2 * (2 // ranks) * 16 * 4
    with pytest.raises(ApiError, match="cannot be divided among 3 devices"):
        check_config(ModelSpec("file:/x", tensor_parallel=3), CONFIG)


def test_one_with_a_tensor_of_another_size_is_refused(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text(json.dumps(CONFIG | {"intermediate_size": 128}))
    with pytest.raises(ApiError, match=r"blocks\.0\.ff\.gate\.weight \[96, 48\] \(expected \[128, 48\]\)"):
        inspect(ModelSpec("file:/x"), checkpoint)


@pytest.mark.slow
async def test_it_is_loaded_and_served(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sitecustomize(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), str(ROOT)]))
    async with run_neuron(checkpoint, command=worker_command) as neuron:
        body = neuron.chat("hello", temperature=0, ignore_eos=True)
        answers = [await neuron.post("/v1/chat/completions", body) for _ in range(2)]
        for status, _, answer in answers:
            assert status == 200, answer
        first, second = (json.loads(answer) for _, _, answer in answers)
        assert first["usage"]["completion_tokens"] == 3
        assert first["choices"] == second["choices"]

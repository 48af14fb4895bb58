"""From an `EngineConfig` to an engine that runs, or to a reason why not."""

from __future__ import annotations

import msgspec
import pytest
import torch
from neuron.checkpoint import layout
from neuron.checkpoint.config import read_config
from neuron.engine.errors import ModelError
from neuron.engine.loading.loading import load_engine, resolve_dtype
from neuron.protocol import EngineConfig, EngineProgress
from safetensors.torch import load_file, save_file

from tests.native import needs_native_kernels
from tests.neuron.engine.checkpoints import SHAPE
from tests.neuron.engine.harness import load
from tests.neuron.engine.toy import request, run


def test_dummy_weights_serve_without_a_checkpoint_file(tmp_path, checkpoint):
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    engine = load(tmp_path, load_format="dummy")
    assert len(run(engine, request(0, [1, 2, 3], 5)).tokens[0]) == 5


def num_parameters(checkpoint) -> int:
    return sum(tensor.numel() for tensor in load_file(checkpoint / "model.safetensors").values())


def test_progress_and_sizes_are_reported(checkpoint):
    seen: list[EngineProgress] = []
    config = EngineConfig(
        model_id="tiny", path=str(checkpoint), num_threads=1, kv_cache_bytes=400_000, max_model_len=64
    )
    engine, loaded = load_engine(config, progress=seen.append)
    assert seen[0].phase == "starting" and seen[-1].phase == "warm_up"
    assert loaded.kv_bytes_per_token == 2 * 2 * 2 * 16 * 4
    assert loaded.num_pages == 400_000 // (16 * loaded.kv_bytes_per_token) - 1
    assert loaded.max_model_len == engine.max_model_len == 64
    stored = 4 * num_parameters(checkpoint)
    assert stored <= loaded.weight_bytes <= 1.1 * stored, "the last panel of a matrix may be filled up with zeros"


def test_a_small_cache_caps_the_served_length(checkpoint):
    engine = load(checkpoint, kv_cache_tokens=100)
    assert engine.max_model_len == 112, "whole pages"
    answers = run(engine, request(0, range(100), 500), request(1, range(112), 5))
    assert len(answers.tokens[0]) == 12 and answers.finish[0] == "length"
    assert answers.failures[1].kind == "too_long"


@needs_native_kernels
def test_a_model_is_the_same_without_the_native_kernels(checkpoint, tmp_path, monkeypatch):
    """Their twins in torch serve where they are not installed. Matrices of 16 bits stay so with them only."""
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(checkpoint / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    answers, loads = [], []
    for is_native in (True, False):
        monkeypatch.setattr(layout, "has_native_kernels", lambda is_native=is_native: is_native)
        config = EngineConfig(model_id="tiny", path=str(tmp_path), num_threads=1, kv_cache_tokens=2048, dtype="float32")
        engine, loaded = load_engine(config)
        loads.append(loaded)
        answers.append(run(engine, request(0, range(40), 12), request(1, range(60, 90), 12)).tokens)
    assert answers[0] == answers[1]
    assert ("native kernels" in loads[0].computed_by, "native kernels" in loads[1].computed_by) == (True, False)
    assert loads[0].weight_bytes < 0.6 * loads[1].weight_bytes


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes_can_be_chosen(checkpoint, dtype):
    engine = load(checkpoint, dtype=dtype)
    assert len(run(engine, request(0, range(40), 5), request(1, range(20), 5)).tokens[1]) == 5


def test_auto_takes_float32_on_the_cpu_and_the_checkpoints_dtype_on_a_device():
    """Of bfloat16 on a CPU see `test_layout`: it depends on the processor."""
    config = EngineConfig(model_id="m", path="/")
    on_device = msgspec.structs.replace(config, devices=(0,))
    assert resolve_dtype(config, read_config(SHAPE | {"dtype": "float16"})) is torch.float32
    assert resolve_dtype(on_device, read_config(SHAPE | {"dtype": "float16"})) is torch.float16
    assert resolve_dtype(on_device, read_config(SHAPE | {"torch_dtype": "torch.bfloat16"})) is torch.bfloat16
    assert resolve_dtype(on_device, read_config(SHAPE)) is torch.bfloat16


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"devices": (99,)}, "device"),
        ({"devices": (0,), "tensor_parallel_size": 2, "group_dir": "/nowhere"}, "device"),
        ({"tensor_parallel_size": 2}, "unsupported_parallelism"),
        ({"kv_cache_bytes": 1}, "out_of_memory"),
    ],
)
def test_what_cannot_be_loaded_says_why(checkpoint, fields, kind):
    with pytest.raises(ModelError) as caught:
        load(checkpoint, **fields)
    assert caught.value.kind == kind

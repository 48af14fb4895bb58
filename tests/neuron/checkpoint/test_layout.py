"""The daemon's estimate of bytes against what the engine's own code makes of the same checkpoint."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from neuron.checkpoint import layout
from neuron.checkpoint.config import ModelConfig, read_config
from neuron.checkpoint.errors import CheckpointError
from neuron.checkpoint.folder import weight_paths
from neuron.checkpoint.layout import (
    Footprint,
    StoredTensor,
    cache_groups,
    dtype_of,
    footprints,
    rank_sizes,
    stored_tensors,
    summarised,
    tensors_of_size,
    uses_native_kernels,
)
from neuron.checkpoint.sharding import ranks_of
from neuron.engine.kv_cache.kv_cache import KVLayout, PagedKV
from neuron.engine.loading.loading import resolve_dtype
from neuron.engine.models.decoder import CausalLM
from neuron.engine.models.registry import build_model
from neuron.engine.parallel.group import ParallelGroup
from neuron.engine.step.step_memory import StepMemory
from neuron.engine.weights import loader
from neuron.protocol import CacheGroup, EngineConfig

from tests.parity.checkpoints import VARIANTS, save_checkpoint

CPU = torch.device("cpu")
NAMES = [variant.name for variant in VARIANTS]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for variant in VARIANTS:
        save_checkpoint(variant, folder / variant.name, max_shard_size="40KB" if "tied" in variant.name else "5GB")
    return folder


def hf_config(path: Path) -> dict[str, Any]:
    return dict(json.loads((path / "config.json").read_text()))


def estimate(path: Path, **settings: Any) -> list[Footprint]:
    config = EngineConfig(model_id="tiny", path=str(path), **settings)
    return footprints(config, read_config(hf_config(path)), stored_tensors(weight_paths(path)))


def built(
    path: Path, dtype: torch.dtype, ranks: int = 1, shares: tuple[int, ...] = (), *, native: bool = False
) -> list[CausalLM]:
    """Filled, but not rearranged: panels of the native kernels may end with rows of zeros."""
    hf = hf_config(path)
    groups = [ParallelGroup(rank, ranks, shares=shares) for rank in range(ranks)]
    models = [build_model(hf, device=CPU, dtype=dtype, parallel=group, native=native) for group in groups]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "finish", lambda model: None)
        for model in models:
            loader.load_weights(model, path)
    return models


def weight_bytes(model: CausalLM) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def kv_bytes(model: CausalLM) -> int:
    shape = model.local
    return KVLayout.uniform(shape.num_layers, shape.num_kv_heads, shape.head_dim, 16, model.dtype).bytes_per_token


@pytest.mark.parametrize("name", NAMES)
def test_one_rank_is_estimated_to_the_byte(checkpoints: Path, name: str) -> None:
    path = checkpoints / name
    for devices in ((), (0,)):
        config = EngineConfig(model_id="tiny", path=str(path), devices=devices)
        dtype = resolve_dtype(config, read_config(hf_config(path)))
        shape = read_config(hf_config(path))
        assert f"torch.{dtype_of(config, shape)}" == str(dtype)
        (model,) = built(path, dtype, native=uses_native_kernels(config, shape))
        (footprint,) = estimate(path, devices=devices)
        assert footprint.weights == weight_bytes(model)
        assert footprint.kv_bytes_per_token == kv_bytes(model)
        assert shape.max_position_embeddings == model.config.max_position_embeddings
        memory = StepMemory(model.local, dtype=dtype, device=CPU, world_size=1)
        assert footprint.activations == 2048 * memory.bytes_per_token + 256 * memory.bytes_per_row


@pytest.mark.parametrize("name", ["qwen3-tied", "qwen2-mha-untied", "llama-mlp-bias-tied", "qwen3-wide-heads-mqa"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_take_what_they_hold(checkpoints: Path, name: str, ranks: int) -> None:
    path = checkpoints / name
    for footprint, model in zip(
        estimate(path, tensor_parallel_size=ranks), built(path, torch.float32, ranks), strict=True
    ):
        assert footprint.kv_bytes_per_token == kv_bytes(model)
        # Biases count in full, a vocabulary that does not divide is padded: a few rows of these tiny models.
        assert weight_bytes(model) * 0.98 <= footprint.weights <= weight_bytes(model) * 1.06


@pytest.mark.parametrize(("name", "shares"), [("llama-mha", (3, 1)), ("qwen2-mha-untied", (1, 3))])
def test_unequal_parts_are_estimated_by_their_ratio(checkpoints: Path, name: str, shares: tuple[int, ...]) -> None:
    path = checkpoints / name
    models = built(path, torch.float32, 2, shares)
    for footprint, model in zip(estimate(path, tensor_parallel_size=2, shares=shares), models, strict=True):
        assert footprint.kv_bytes_per_token == kv_bytes(model)
        assert footprint.weights == pytest.approx(weight_bytes(model), rel=0.1)


def test_the_size_of_the_files_is_enough_for_an_estimate_before_they_are_there(checkpoints: Path) -> None:
    path = checkpoints / "llama-mha"
    shape = read_config(hf_config(path))
    num_bytes = sum(file.stat().st_size for file in weight_paths(path)) // 2  # stored as float32, estimated as bfloat16
    config = EngineConfig(model_id="tiny", path=str(path))
    (rough,) = footprints(config, as_bf16(shape), tensors_of_size(num_bytes, as_bf16(shape)))
    (exact,) = estimate(path)
    half = 2 if uses_native_kernels(config, shape) else 1  # bfloat16 is held as it is stored
    assert rough.weights * half == pytest.approx(exact.weights, rel=0.05)
    assert rough.kv_bytes_per_token == exact.kv_bytes_per_token


def as_bf16(shape: ModelConfig) -> ModelConfig:
    return dataclasses.replace(shape, dtype="bfloat16")


@pytest.mark.parametrize("config", [{}, {"hidden_size": 64}, {"num_attention_heads": "many", "hidden_size": 64}])
def test_a_config_without_figures_is_not_estimated(config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError):
        read_config({"model_type": "llama"} | config)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda data: b"", "has no header"),
        (lambda data: data[:-1], "cut short by 1 bytes"),
        (lambda data: data[:8] + b"x" * (len(data) - 8), "not a safetensors header"),
        (lambda data: (2**40).to_bytes(8, "little") + data[8:], "a header of"),
    ],
)
def test_damaged_files_are_found_by_their_headers(checkpoints: Path, tmp_path: Path, damage: Any, why: str) -> None:
    (source,) = weight_paths(checkpoints / "llama-mha")
    file = tmp_path / "model.safetensors"
    file.write_bytes(damage(source.read_bytes()))
    with pytest.raises(CheckpointError, match=why) as caught:
        stored_tensors([file])
    assert caught.value.file == "model.safetensors"


def test_layers_of_one_window_are_a_cache_group() -> None:
    config = read_config(
        {
            "model_type": "qwen2",
            "vocab_size": 100,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        }
    )
    for rank in ranks_of(2):
        groups = cache_groups(config, rank_sizes(config, rank), 2)
        assert [(group.layers, group.window) for group in groups] == [((0, 2), 16), ((1, 3), None)]
        assert {(group.num_kv_heads, group.head_dim, group.bytes_per_token) for group in groups} == {(1, 8, 64)}


def test_each_layer_has_pages_of_its_groups_shape() -> None:
    groups = (CacheGroup((0, 2), 2, 8, 4, window=16), CacheGroup((1,), 1, 16, 4))
    layout = KVLayout(groups, 4, torch.float32)
    cache = PagedKV(layout, 3, CPU)
    assert [tuple(cache.layer(index).shape) for index in range(3)] == [
        (3, 2, 4, 2, 8),
        (3, 2, 4, 1, 16),
        (3, 2, 4, 2, 8),
    ]
    held = sum(cache.layer(index).numel() * 4 for index in range(3))
    assert held == cache.num_bytes == 3 * 4 * layout.bytes_per_token


def test_experts_and_codes_are_counted_in_bytes_of_their_own(checkpoints: Path) -> None:
    """A rank has its share of experts, whatever the KV heads; codes keep the bits that they are stored in."""
    model = as_bf16(read_config(hf_config(checkpoints / "llama-mha")))
    tensors = [
        StoredTensor("model.layers.0.mlp.experts.3.up_proj.weight", 1000, is_matrix=True),
        StoredTensor("model.layers.0.mlp.down_proj.codes", 4000, is_matrix=True, bits=4),
        StoredTensor("model.layers.0.mlp.down_proj.scales", 100, is_matrix=True, bits=8),
        StoredTensor("model.norm.weight", 10, is_matrix=False),
    ]
    config = EngineConfig(model_id="m", path="", devices=(0, 1), tensor_parallel_size=2)
    for given in (tensors, summarised(tensors, model)):
        for found in footprints(config, model, given):
            assert found.experts == 500 * 2
            assert found.weights == 500 * 2 + 1000 + 50 + 10 * 2


@pytest.mark.parametrize("is_fast", [True, False])
@pytest.mark.parametrize(
    ("asked", "stored", "devices", "slow", "fast"),
    [
        ("auto", "bfloat16", (), "float32", "bfloat16"),
        ("auto", "float16", (), "float32", "float32"),
        ("auto", "float32", (), "float32", "float32"),
        ("auto", None, (), "float32", "float32"),
        ("float32", "bfloat16", (), "float32", "float32"),
        ("bfloat16", "float32", (), "bfloat16", "bfloat16"),
        ("auto", "float16", (0,), "float16", "float16"),
        ("auto", None, (0,), "bfloat16", "bfloat16"),
    ],
)
def test_the_dtype_is_what_the_processor_does_well(
    checkpoints: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: Any,
    stored: str | None,
    devices: tuple[int, ...],
    slow: str,
    fast: str,
    is_fast: bool,
) -> None:
    """float16 and float32 have more digits than bfloat16: nobody loses them without having asked for it."""
    monkeypatch.setattr(layout, "multiplies_bfloat16", lambda: is_fast)
    path = checkpoints / NAMES[0]
    model = dataclasses.replace(read_config(hf_config(path)), dtype=stored)
    config = EngineConfig(model_id="tiny", path=str(path), dtype=asked, devices=devices)
    assert layout.dtype_of(config, model) == (fast if is_fast else slow)

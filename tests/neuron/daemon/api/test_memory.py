"""Loads that do and do not fit, on a host whose memory the tests decide: how busy this one is changes nothing."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest
from neuron.daemon.common.config import EngineSection, NeuronConfig
from neuron.daemon.hardware import host
from neuron.daemon.hardware.host import anonymous_bytes, memory_free_mb, memory_total_mb

from tests.neuron.checkpoint_folders import TINY, with_text, write_checkpoint
from tests.neuron.daemon.api.harness import RunningNeuron, run_neuron
from tests.neuron.engine.checkpoints import write_qwen3
from tests.neuron.scripted_engine import eventually, scripted_with

MIB = 2**20


@pytest.fixture(autouse=True)
def _host_of_eight_gigabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "total_host_bytes", lambda: 8_000 * MIB)
    monkeypatch.setattr(host, "available_host_bytes", lambda: 6_000 * MIB)


def sparse_checkpoint(folder: Path, num_bytes: int, **changes: Any) -> Path:
    """A checkpoint with about so many bytes of bfloat16 matrices: all holes, so it takes no room on disk."""
    config = TINY | {"torch_dtype": "bfloat16", "hidden_size": 1024, "num_hidden_layers": 64} | changes
    matrices = 3 * config["num_hidden_layers"]
    config["intermediate_size"] = max(64, num_bytes // 2 // config["hidden_size"] // matrices)
    return write_checkpoint(folder, config, dtype="BF16")


async def load(neuron: RunningNeuron, folder: Path, **fields: Any) -> tuple[int, dict[str, Any]]:
    status, _, body = await neuron.post("/models/load", {"model_id": f"file:{folder}", **fields})
    return status, json.loads(body)


async def test_a_model_larger_than_the_host_is_refused_before_anything_starts(checkpoint: Path, tmp_path: Path) -> None:
    large = sparse_checkpoint(tmp_path / "large", memory_total_mb() * MIB)
    async with run_neuron(checkpoint) as neuron:
        pids = children()
        status, answer = await load(neuron, large)
        error = answer["error"]
        assert (status, error["kind"], error["code"]) == (422, "insufficient_memory", "insufficient_memory")
        # Held as bfloat16, as it is stored; without the native kernels it would be float32.
        assert error["required_mb"] > memory_total_mb() > error["free_mb"] > 0
        assert error["devices"][0]["weights_mb"] >= memory_total_mb()
        assert children() == pids
        assert [model["id"] for model in await neuron.get("/models")] == [neuron.model]  # it leaves no trace
        status, _, _ = await neuron.post("/v1/chat/completions", neuron.chat())
        assert status == 200


async def test_the_context_is_what_memory_allows_and_is_advertised(checkpoint: Path, tmp_path: Path) -> None:
    # 128 KiB of cache per token (192 with copies for decoding): a million positions are more than any test host has.
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 64, "num_hidden_layers": 16}
    window = memory_total_mb() * MIB // (128 * 1024)
    long = sparse_checkpoint(tmp_path / "long", 64 * MIB, **heads, max_position_embeddings=window)
    async with run_neuron(checkpoint, load=False) as neuron:
        status, answer = await load(neuron, long)
        assert status == 200, answer
        fit = neuron.daemon.services.manager.get(f"file:{long}").fit
        assert fit is not None and 2048 <= fit.context_tokens < window
        assert fit.config.max_model_len == fit.context_tokens
        assert fit.bytes_on[None] < memory_free_mb() * MIB


async def test_a_cache_of_a_configured_size_that_does_not_fit_says_which_would(
    checkpoint: Path, tmp_path: Path
) -> None:
    folder = sparse_checkpoint(tmp_path / "small", 64 * MIB)
    async with run_neuron(checkpoint, load=False) as neuron:
        status, answer = await load(neuron, folder, kv_cache_mb=memory_total_mb())
        assert status == 422, answer
        (option,) = (option for option in answer["error"]["would_fit"] if "kv_cache_mb" in option)
        assert 0 < option["kv_cache_mb"] < memory_total_mb()
        status, answer = await load(neuron, folder, kv_cache_mb=option["kv_cache_mb"] // 2)
        assert status == 200, answer


async def test_models_that_are_promised_the_rest_are_named(checkpoint: Path, tmp_path: Path) -> None:
    folder = sparse_checkpoint(tmp_path / "small", 64 * MIB)
    other = sparse_checkpoint(tmp_path / "other", 64 * MIB)
    async with run_neuron(checkpoint, load=False) as neuron:
        status, answer = await load(neuron, folder, kv_cache_mb=memory_free_mb() // 2)
        assert status == 200, answer
        # Nothing of it has been taken: it is promised all the same.
        status, answer = await load(neuron, other, kv_cache_mb=memory_free_mb() // 2)
        assert status == 422 and {"unload": [f"file:{folder}"]} in answer["error"]["would_fit"], answer
        status, _, _ = await neuron.post("/models/unload", {"model_id": f"file:{folder}"})
        assert status == 200
        status, answer = await load(neuron, other, kv_cache_mb=memory_free_mb() // 4)
        assert status == 200, answer


async def test_a_load_that_another_one_stands_in_the_way_of_is_tried_again_by_itself(
    checkpoint: Path, tmp_path: Path
) -> None:
    first = sparse_checkpoint(tmp_path / "first", 64 * MIB)
    second = sparse_checkpoint(tmp_path / "second", 64 * MIB)
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    command = scripted_with("--gate", str(gate))
    async with run_neuron(checkpoint, load=False, command=command) as neuron:
        manager = neuron.daemon.services.manager
        loading = asyncio.create_task(load(neuron, first, kv_cache_mb=memory_free_mb() // 2))
        await eventually(lambda: (model := manager.find(f"file:{first}")) is not None and model.group is not None)
        waiting = asyncio.create_task(load(neuron, second, kv_cache_mb=memory_free_mb() // 2))
        await eventually(lambda: (model := manager.find(f"file:{second}")) is not None and bool(model.state.error))
        error = manager.get(f"file:{second}").state.error
        assert error is not None and "may free" in error
        status, _, _ = await neuron.post("/models/unload", {"model_id": f"file:{first}"})
        assert status == 200 and (await loading)[0] == 409
        await eventually(lambda: manager.get(f"file:{second}").group is not None)
        await asyncio.to_thread(gate.write_text, "go")
        assert (await waiting)[0] == 200


async def test_a_damaged_file_is_refused_before_anything_starts(checkpoint: Path, tmp_path: Path) -> None:
    folder = with_text(write_qwen3(tmp_path / "model"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    async with run_neuron(checkpoint, load=False) as neuron:
        pids = children()
        status, answer = await load(neuron, folder)
        assert (
            status == 422 and answer["error"]["code"] == "bad_checkpoint" and "cut short" in answer["error"]["message"]
        )
        assert children() == pids and await neuron.get("/models") == []


@pytest.mark.slow
async def test_a_real_engine_takes_no_more_than_was_estimated(checkpoint: Path, tmp_path: Path) -> None:
    from neuron.daemon.hub.sources import DEMO_MODEL
    from neuron.daemon.supervisor.process_group import worker_command

    engine = EngineSection(num_threads=1, kv_cache_tokens=16_384, max_step_tokens=512, stable_after_s=0)
    config = NeuronConfig(engine=engine)
    async with run_neuron(checkpoint, config=config, load=False, command=worker_command) as neuron:
        status, _, body = await neuron.post("/models/load", {"model_id": DEMO_MODEL})
        assert status == 200, body
        model = neuron.daemon.services.manager.get(DEMO_MODEL)
        assert model.fit is not None and model.loaded is not None and model.group is not None
        assert model.loaded.max_model_len == model.fit.context_tokens == 16_384
        assert model.loaded.num_pages * model.loaded.page_size == 16_384
        prompt = " ".join(str(number) for number in range(2500))
        requests = [
            neuron.post("/v1/completions", {"model": DEMO_MODEL, "prompt": f"{index} {prompt}", "max_tokens": 8})
            for index in range(2)
        ]
        answers = await asyncio.gather(*requests)
        assert all(status == 200 for status, _, _ in answers), answers
        (pid,) = model.group.pids
        taken = anonymous_bytes(pid)
        print(f"taken {taken / MIB:.0f} MiB, estimated {model.fit.bytes_on[None] / MIB:.0f} MiB")
        assert taken <= model.fit.bytes_on[None]


def children() -> set[str]:
    """Processes this one has started."""
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())

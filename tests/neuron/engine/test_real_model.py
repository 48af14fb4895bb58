"""The engine over a real family and the CPU's attention backend, as `load_engine` builds it."""

from __future__ import annotations

import random

import msgspec
import pytest
import torch
from neuron.checkpoint.config import read_config
from neuron.engine.errors import ModelError
from neuron.engine.loading.loading import load_engine, resolve_dtype
from neuron.engine.step.engine import Engine
from neuron.protocol import EngineConfig, EngineProgress, SamplingParams
from safetensors.torch import load_file

from tests.neuron.engine.checkpoints import SHAPE, write_qwen3
from tests.neuron.engine.toy import Answers, request, run

VOCAB = SHAPE["vocab_size"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_qwen3(tmp_path_factory.mktemp("qwen3"))


def load(checkpoint, **fields) -> Engine:
    fields = {"num_threads": 1, "kv_cache_tokens": 2048} | fields
    return load_engine(EngineConfig(model_id="tiny", path=str(checkpoint), **fields))[0]


@pytest.fixture(scope="module")
def alone(checkpoint):
    """Answers of an engine that serves one request at a time and remembers nothing."""
    engine = load(checkpoint, prefix_cache=False)

    def answer(item) -> list[int]:
        return run(engine, item, check=False).tokens[item.request_id]

    return answer


def test_a_hundred_concurrent_requests_get_the_answers_they_get_alone(checkpoint, alone):
    """Mixed lengths, shared prefixes, cancellations, a cache too small for all: judged line 4 of the main job."""
    rng = random.Random(4)
    shared = [rng.randrange(VOCAB) for _ in range(70)]
    items = []
    for number in range(100):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, rng.choice([6, 6, 90])))]
        sampling = SamplingParams(temperature=0.0) if number % 5 else SamplingParams(seed=number, top_p=0.9)
        beginning = shared[: rng.randint(1, 70)] if number % 3 == 0 else []
        items.append(request(number, beginning + prompt, rng.randint(1, 90), sampling=sampling))
    cancelled = set(rng.sample(range(100), 12))
    engine = load(checkpoint, kv_cache_tokens=640, max_step_tokens=96, max_running=16)
    answers = Answers()
    queue, step = list(items), 0
    while queue or engine.has_work:
        step += 1
        for _ in range(rng.randint(0, 5)):
            if queue:
                engine.add(queue.pop(0))
        if step % 4 == 0 and cancelled:
            engine.cancel(cancelled.pop())
        output = engine.step()
        if output is not None:
            answers.take(output)
    stats = engine.stats()
    assert stats.preemptions > 0 and stats.prefix_hit_tokens > 0
    assert answers.failures == {} and len(answers.finish) >= 88
    for request_id in answers.finish:
        assert answers.tokens[request_id] == alone(items[request_id]), f"request {request_id}"
    assert stats.free_pages == stats.total_pages and stats.running == stats.waiting == 0
    assert engine.check() == []


def test_steps_that_fail_and_are_repeated_change_no_answer(checkpoint, alone):
    engine = load(checkpoint)
    model = engine._runner._model
    layer = model.layers[1]
    forward, calls = layer.forward, []

    def flaky(*arguments):
        calls.append(1)
        if len(calls) % 7 == 3:
            raise MemoryError("after the first layer has written its keys")
        return forward(*arguments)

    layer.forward = flaky
    items = [request(number, range(number, number + 30), 20) for number in range(6)]
    answers = run(engine, *items)
    assert answers.failures == {}
    for item in items:
        assert answers.tokens[item.request_id] == alone(item)


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
    assert loaded.weight_bytes == 4 * num_parameters(checkpoint)


def test_a_small_cache_caps_the_served_length(checkpoint):
    engine = load(checkpoint, kv_cache_tokens=100)
    assert engine.max_model_len == 112, "whole pages"
    answers = run(engine, request(0, range(100), 500), request(1, range(112), 5))
    assert len(answers.tokens[0]) == 12 and answers.finish[0] == "length"
    assert answers.failures[1].kind == "too_long"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes_can_be_chosen(checkpoint, dtype):
    engine = load(checkpoint, dtype=dtype)
    assert len(run(engine, request(0, range(40), 5), request(1, range(20), 5)).tokens[1]) == 5


def test_auto_takes_float32_on_the_cpu_and_the_checkpoints_dtype_on_a_device():
    config = EngineConfig(model_id="m", path="/")
    on_device = msgspec.structs.replace(config, devices=(0,))
    assert resolve_dtype(config, read_config(SHAPE | {"dtype": "bfloat16"})) is torch.float32
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

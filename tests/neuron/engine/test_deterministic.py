"""`deterministic` end to end: tokens and log-probabilities of a request are the same bits in any company."""

from __future__ import annotations

import random

import pytest
from neuron.engine.loading.loading import load_engine
from neuron.engine.step.engine import Engine
from neuron.protocol import EngineConfig, Generate, SamplingParams

from tests.neuron.engine.checkpoints import SHAPE, write_qwen3
from tests.neuron.engine.toy import Answers, request, run

VOCAB = SHAPE["vocab_size"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_qwen3(tmp_path_factory.mktemp("qwen3"))


def load(checkpoint, **fields) -> Engine:
    fields = {"num_threads": 1, "kv_cache_tokens": 2048, "deterministic": True} | fields
    return load_engine(EngineConfig(model_id="tiny", path=str(checkpoint), **fields))[0]


def some_requests(number: int) -> list[Generate]:
    """Mixed lengths, shared beginnings, every kind of sampling, log-probabilities of outputs and of prompts."""
    rng = random.Random(7)
    shared = [rng.randrange(VOCAB) for _ in range(50)]
    kinds = [
        SamplingParams(temperature=0.0, logprobs=3),
        SamplingParams(seed=5, logprobs=2),
        SamplingParams(seed=6, top_p=0.9, logprobs=0),
        SamplingParams(seed=7, temperature=0.7, top_k=20, min_p=0.01, logprobs=2),
        SamplingParams(seed=8, repetition_penalty=1.3, presence_penalty=0.2, logprobs=1),
    ]
    items = []
    for index in range(number):
        prompt = shared[: rng.choice([0, 17, 48])] + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 60))]
        sampling = kinds[index % len(kinds)]
        items.append(request(index, prompt, rng.randint(2, 14), sampling=sampling, prompt_logprobs=index % 6 == 1))
    return items


def same(first: Answers, second: Answers, request_id: int) -> bool:
    """Floats are compared as they are: any other bit is another result."""
    return all(
        getattr(first, what).get(request_id) == getattr(second, what).get(request_id)
        for what in ("tokens", "logprobs", "prompt_logprobs")
    )


def test_a_request_gets_the_same_bits_alone_and_in_any_company(checkpoint) -> None:
    items = some_requests(18)
    engine = load(checkpoint, prefix_cache=False)
    alone = [run(engine, item, check=False) for item in items]
    for description, engine in {
        "small steps, a cache too small for all, shared prefixes": load(
            checkpoint, max_step_tokens=24, max_running=7, kv_cache_tokens=320
        ),
        "everybody at once": load(checkpoint, prefix_cache=False, max_step_tokens=1024),
        "one step ahead": load(checkpoint, max_step_tokens=64, overlap=True),
    }.items():
        crowd = run(engine, *items, check=False)
        differing = [
            item.request_id
            for item, answer in zip(items, alone, strict=True)
            if not same(answer, crowd, item.request_id)
        ]
        assert not differing, description
    # Once more with everything that the first round has left in the prefix cache.
    engine = load(checkpoint)
    run(engine, *items, check=False)
    warm = run(engine, *items, check=False)
    assert sum(warm.cached.values()) > 0
    assert all(same(answer, warm, item.request_id) for item, answer in zip(items, alone, strict=True))

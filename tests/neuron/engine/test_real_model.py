"""The engine over a real family and the CPU's attention backend, as `load_engine` builds it."""

from __future__ import annotations

import random

import pytest
from neuron.protocol import SamplingParams

from tests.neuron.engine.checkpoints import SHAPE
from tests.neuron.engine.harness import load
from tests.neuron.engine.toy import Answers, request, run

VOCAB = SHAPE["vocab_size"]


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

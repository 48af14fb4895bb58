from __future__ import annotations

import random

import pytest
import torch
from neuron.engine.errors import DeviceError
from neuron.engine.step import engine as engine_module
from neuron.protocol import SamplingParams

from tests.neuron.engine.toy import GREEDY, PAGE, VOCAB, Answers, ToyModel, answer_alone, request, run, toy_engine


def prompts(number: int, *, longest: int = 60, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(rng.randint(1, longest))] for _ in range(number)]


def test_an_answer_follows_from_the_prompt():
    first, second = prompts(2, seed=3)
    assert answer_alone(first) == answer_alone(first)
    assert answer_alone(first) != answer_alone(second)
    assert len(answer_alone(first, 20)) == 20


def test_chunked_prefill_and_cached_prefixes_do_not_change_answers():
    prompt = prompts(1, longest=90, seed=5)[0] + [7] * 40
    expected = answer_alone(prompt, 12)
    engine = toy_engine(max_step_tokens=9)
    assert run(engine, request(0, prompt, 12)).tokens[0] == expected
    again = run(engine, request(1, prompt, 12))
    assert again.tokens[1] == expected
    # Everything but the last page can come from the cache; the last token is always computed.
    assert again.cached[1] == (len(prompt) - 1) // PAGE * PAGE


@pytest.mark.parametrize("number_of", [40, pytest.param(100, marks=pytest.mark.full)])
def test_F1_many_requests_get_the_answers_they_get_alone(number_of: int) -> None:
    rng = random.Random(11)
    shared = [rng.randrange(VOCAB) for _ in range(50)]
    items = [
        request(number, (shared if number % 4 == 0 else []) + prompt, rng.randint(1, 40))
        for number, prompt in enumerate(prompts(number_of, seed=12))
    ]
    expected = {item.request_id: answer_alone(item.prompt_ids, item.max_tokens) for item in items}
    cancelled = set(rng.sample(range(number_of), number_of * 15 // 100))
    engine = toy_engine(num_pages=50, max_step_tokens=24, max_running=12)
    answers = Answers()
    queue = list(items)
    step = 0
    while queue or engine.has_work:
        step += 1
        for _ in range(rng.randint(0, 4)):
            if queue:
                engine.add(queue.pop(0))
        if step % 3 == 0 and cancelled:
            engine.cancel(cancelled.pop())
        output = engine.step()
        if output is not None:
            answers.take(output)
        assert engine.check() == []
    assert engine.stats().preemptions > 0, "this load is meant to overcommit the cache"
    assert engine.stats().prefix_hit_tokens > 0
    assert answers.failures == {}
    assert len(answers.finish) >= number_of * 85 // 100
    for request_id in answers.finish:
        assert answers.tokens[request_id] == expected[request_id]
    stats = engine.stats()
    assert stats.running == stats.waiting == 0
    assert stats.free_pages == stats.total_pages


def test_cancelling_frees_everything_and_is_final():
    engine = toy_engine(max_running=2)
    for number in range(5):
        engine.add(request(number, range(30), 50))
    engine.step()
    for number in (0, 4, 99):
        engine.cancel(number)
    later = engine.step()
    assert all(update.request_id not in (0, 4) for update in later.updates)
    for number in (1, 2, 3):
        engine.cancel(number)
    assert engine.has_work, "the daemon is told that the pages are free"
    last = engine.step()
    assert last.updates == []
    assert last.stats.free_pages == last.stats.total_pages
    assert engine.is_idle
    assert engine.step() is None


def test_ends_at_stop_token_limit_and_model_length():
    prompt = [1, 2, 3]
    plain = answer_alone(prompt, 10)
    stop = plain[4]
    cut = plain.index(stop)
    stopped = run(toy_engine(), request(0, prompt, 10, stop_token_ids=(stop,)))
    assert stopped.tokens[0] == plain[:cut]
    assert stopped.finish[0] == "stop"
    assert run(toy_engine(), request(0, prompt, 3)).finish[0] == "length"
    full = run(toy_engine(max_model_len=12), request(0, prompt, 100))
    assert full.finish[0] == "length"
    assert len(full.tokens[0]) == 9


def test_a_prompt_that_never_fits_fails_alone():
    engine = toy_engine(num_pages=11, max_model_len=200)
    assert engine.max_model_len == 40
    answers = run(engine, request(0, range(30), 4), request(1, [5] * 40, 4), request(2, [6] * 39, 4))
    assert answers.failures[1].kind == "too_long"
    assert set(answers.finish) == {0, 2}
    assert answers.tokens[0] == answer_alone(range(30), 4)


@pytest.mark.parametrize(
    "bad",
    [
        request(1, []),
        request(1, [VOCAB]),
        request(1, [-1]),
        request(1, [1], sampling=SamplingParams(logit_bias={VOCAB: 1.0})),
    ],
)
def test_input_that_would_fault_on_the_device_is_refused_alone(bad):
    answers = run(toy_engine(), request(0, [1, 2]), bad)
    assert answers.failures[1].kind == "internal"
    assert answers.finish[0] == "length"


def test_resuming_continues_token_for_token():
    prompt = list(range(20))
    for sampling in (
        GREEDY,
        SamplingParams(temperature=1.0, seed=5),
        SamplingParams(temperature=0.7, top_p=0.9, seed=6, frequency_penalty=0.5, repetition_penalty=1.2),
    ):
        whole = answer_alone(prompt, 20, sampling=sampling)
        for cut in (1, 7, 19):
            rest = run(toy_engine(), request(0, prompt, 20, sampling=sampling, output_ids=tuple(whole[:cut])))
            assert rest.tokens[0] == whole[cut:]
    done = run(toy_engine(), request(0, prompt, 3, output_ids=(1, 2, 3)))
    assert done.finish[0] == "length" and done.tokens[0] == []


def test_what_a_resumed_sequence_finds_of_its_own_output_is_no_cached_prompt():
    engine, prompt = toy_engine(), list(range(20))
    whole = run(engine, request(0, prompt, 20)).tokens[0]
    again = run(engine, request(1, prompt, 20, output_ids=tuple(whole[:19])))
    assert again.tokens[1] == whole[19:] and again.cached[1] == 20


def test_sampled_answers_do_not_depend_on_neighbours():
    rng = random.Random(2)
    items = [
        request(
            number,
            prompt,
            12,
            sampling=SamplingParams(
                temperature=rng.choice([0.0, 0.5, 1.0, 1.5]),
                top_p=rng.choice([1.0, 0.8]),
                top_k=rng.choice([0, 0, 5]),
                min_p=rng.choice([0.0, 0.05]),
                presence_penalty=rng.choice([0.0, 0.5]),
                seed=rng.randrange(2**63),
            ),
        )
        for number, prompt in enumerate(prompts(24, seed=7, longest=20))
    ]
    expected = {item.request_id: answer_alone(item.prompt_ids, 12, sampling=item.sampling) for item in items}
    for _ in range(2):
        rng.shuffle(items)
        answers = run(toy_engine(), *items)
        assert answers.tokens == expected


def test_running_out_of_pages_preempts_the_latest_and_changes_no_answer():
    items = [request(number, range(number, number + 16), 40) for number in range(4)]
    engine = toy_engine(num_pages=31)
    answers = run(engine, *items)
    assert engine.stats().preemptions > 0
    for item in items:
        assert answers.tokens[item.request_id] == answer_alone(item.prompt_ids, 40)
    assert next(iter(answers.finish)) == 0, "the first to arrive is never the one that gives way"


def test_log_probabilities_of_output_and_prompt():
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]
    sampling = SamplingParams(temperature=0.0, logprobs=3)
    small = run(toy_engine(max_step_tokens=4), request(0, prompt, 5, sampling=sampling, prompt_logprobs=True))
    whole = run(toy_engine(), request(0, prompt, 5, sampling=sampling, prompt_logprobs=True))
    assert len(small.logprobs[0]) == 5
    for token, entry in zip(small.tokens[0], small.logprobs[0], strict=True):
        assert entry.top_ids[0] == token
        assert entry.top_logprobs[0] == pytest.approx(entry.logprob)
        assert len(entry.top_ids) == 3
        assert entry.top_logprobs == sorted(entry.top_logprobs, reverse=True)
    assert len(small.prompt_logprobs[0]) == len(prompt) - 1
    for ours, other in zip(small.prompt_logprobs[0], whole.prompt_logprobs[0], strict=True):
        assert ours.logprob == pytest.approx(other.logprob, abs=1e-5)
    # Entry i belongs to prompt token i+1: serving a prefix greedily must agree with it.
    for cut in (1, 6, 14):
        alone = run(toy_engine(), request(0, prompt[:cut], 1, sampling=sampling))
        entry = whole.prompt_logprobs[0][cut - 1]
        assert entry.top_ids == alone.logprobs[0][0].top_ids
        assert entry.top_logprobs == pytest.approx(alone.logprobs[0][0].top_logprobs, abs=1e-5)


def test_prompt_log_probabilities_survive_preemption():
    items = [
        request(n, range(n, n + 16), 40, prompt_logprobs=True, sampling=SamplingParams(temperature=0.0, logprobs=0))
        for n in range(4)
    ]
    engine = toy_engine(num_pages=31, max_step_tokens=10)
    answers = run(engine, *items)
    assert engine.stats().preemptions > 0
    assert all(len(answers.prompt_logprobs[n]) == 15 for n in range(4))


# ---------------------------------------------------------------------- faults, by blast radius


def test_F7_a_sequence_that_breaks_its_step_fails_alone():
    model = ToyModel()
    engine = toy_engine(model)

    def explode(batch):
        if (batch.token_ids == 77).any():
            raise RuntimeError("shape mismatch")

    model.on_forward = explode
    items = [request(number, range(number, number + 6), 10) for number in range(5)]
    answers = run(engine, *items, request(9, [1, 77, 2], 10))
    assert answers.failures[9].kind == "step"
    assert "shape mismatch" in answers.failures[9].message
    for item in items:
        assert 77 in answer_alone(item.prompt_ids, 10) or answers.finish[item.request_id] == "length"


def test_F5_out_of_memory_shrinks_prefill_and_loses_nobody():
    model = ToyModel()
    engine = toy_engine(model, max_step_tokens=32)
    sizes = []

    def limited(batch):
        sizes.append(batch.num_tokens)
        if batch.num_tokens > 10:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    model.on_forward = limited
    items = [request(number, range(number, number + 40), 6) for number in range(3)]
    answers = run(engine, *items)
    assert answers.failures == {}
    assert max(sizes) > 10
    for item in items:
        assert answers.tokens[item.request_id] == answer_alone(item.prompt_ids, 6)


def test_out_of_memory_that_never_ends_fails_only_whom_it_concerns(monkeypatch):
    monkeypatch.setattr(engine_module, "_DEFER_S", (0.0, 0.0, 0.0))
    model = ToyModel()
    engine = toy_engine(model)

    def explode(batch):
        if (batch.token_ids == 88).any():
            raise MemoryError

    model.on_forward = explode
    answers = run(engine, request(0, [1, 2, 3], 4), request(1, [88] * 30, 4))
    assert answers.failures[1].kind == "step"
    assert answers.tokens[0] == answer_alone([1, 2, 3], 4)


def test_who_finds_no_memory_is_set_back_and_comes_again(monkeypatch):
    monkeypatch.setattr(engine_module, "_DEFER_S", (0.0, 0.0, 0.0))
    model = ToyModel()
    engine = toy_engine(model)
    attempts = []

    def explode(batch):
        if (batch.token_ids == 88).any():
            attempts.append(batch.num_tokens)
            if len(attempts) < 8:
                raise MemoryError

    model.on_forward = explode
    answers = run(engine, request(0, [1, 2, 3], 4), request(1, [88] * 30, 4))
    assert answers.failures == {}
    for number, prompt in ((0, [1, 2, 3]), (1, [88] * 30)):
        assert answers.tokens[number] == answer_alone(prompt, 4)
    assert engine.check() == [] and engine.stats().free_pages == engine.stats().total_pages


def test_who_is_set_back_may_leave(monkeypatch):
    monkeypatch.setattr(engine_module, "_DEFER_S", (3600.0,))
    model = ToyModel()
    engine = toy_engine(model)

    def explode(batch):
        raise MemoryError

    model.on_forward = explode
    engine.add(request(0, [1, 2, 3], 4))
    engine.step()
    assert not engine.has_work and not engine.is_idle, "it waits for memory, and others may work"
    engine.cancel(0)
    engine.step()
    assert engine.is_idle and engine.check() == []


def test_N10_nan_logits_end_one_request_and_its_pages_are_not_reused_as_they_are():
    model = ToyModel()
    engine = toy_engine(model)
    victim = list(range(50, 63))
    model.embedding[60] = float("nan")
    answers = run(engine, request(0, [1, 2, 3], 6), request(1, victim, 6))
    assert answers.failures[1].kind == "nan_logits"
    assert engine.stats().free_pages == engine.stats().total_pages, "its pages are zeroed at once"
    assert f"{VOCAB} NaN" in answers.failures[1].message
    assert answers.tokens[0] == answer_alone([1, 2, 3], 6)
    model.embedding[60] = 0.5
    healed = run(engine, request(2, victim, 6))
    assert healed.cached[2] == 0, "no prefix may be found in distrusted pages"
    assert healed.finish[2] == "length"
    for index in range(2):
        assert torch.isfinite(engine._runner.kv.layer(index)).all()


def test_a_lost_device_is_reported_as_such():
    model = ToyModel()
    engine = toy_engine(model)

    def explode(batch):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    model.on_forward = explode
    engine.add(request(0, [1]))
    with pytest.raises(DeviceError, match="illegal memory access"):
        engine.step()

"""One-step overlap on a device that lags: the same answers as without, and no page in two hands."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from neuron.engine.errors import DeviceError
from neuron.engine.step import engine as engine_module
from neuron.engine.step.engine import Engine
from neuron.protocol import Generate, GrammarSpec

from tests.neuron.engine.lazy_stream import LazyStream
from tests.neuron.engine.step.harness import KINDS, PageWatch, alone, drive, same, with_grammars
from tests.neuron.engine.toy import VOCAB, Answers, ToyModel, request, toy_engine
from tests.neuron.rounds import ROUNDS


def lagging_engine(model: ToyModel | None = None, *, seed: int = 0, eagerness: float = 0.0, **limits) -> Engine:
    engine = with_grammars(toy_engine(model, overlaps=True, stream=LazyStream(seed, eagerness), **limits))
    PageWatch(engine)
    return engine


def serve(engine: Engine, *items: Generate) -> Answers:
    answers = Answers()
    for item in items:
        engine.add(item)
    drive(engine, answers)
    return answers


@pytest.mark.parametrize("kind", range(len(KINDS)))
@pytest.mark.parametrize("constrained", [False, True])
def test_every_kind_of_sampling_gives_the_answer_of_an_engine_that_waits(kind: int, constrained: bool) -> None:
    grammar = GrammarSpec("9") if constrained else None
    item = request(0, range(11), 15, sampling=KINDS[kind], grammar=grammar)
    neighbour = request(1, range(30, 35), 15)
    answers = serve(lagging_engine(max_step_tokens=7), item, neighbour)
    same(item, answers)
    same(neighbour, answers)


def test_the_next_step_is_launched_before_the_last_one_is_read() -> None:
    engine = lagging_engine()
    events: list[str] = []
    launch, collect = engine._runner.launch, engine._runner.collect
    engine._runner.launch = lambda plan: (events.append(f"launch {plan.step}"), launch(plan))[1]
    engine._runner.collect = lambda in_flight: (events.append(f"read {in_flight.plan.step}"), collect(in_flight))[1]
    serve(engine, request(0, range(5), 4))
    # The fourth token is the last by number, so no fifth step is computed for it.
    assert events == ["launch 1", "launch 2", "read 1", "launch 3", "read 2", "launch 4", "read 3", "read 4"]


def test_one_frame_reports_each_step_and_none_is_empty() -> None:
    engine = lagging_engine()
    engine.add(request(0, range(5), 6))
    tokens = []
    while engine.has_work:
        output = engine.step()
        assert output is not None and len(output.updates) == 1
        tokens.append(output.updates[0].token_ids)
    assert [len(part) for part in tokens] == [1] * 6


def test_a_row_that_has_ended_is_thrown_away_and_its_pages_come_back_after_that() -> None:
    plain = alone(request(0, [1, 2, 3], 20)).tokens[0]
    stop = next(token for index, token in enumerate(plain) if index >= 3 and token not in plain[:index])
    engine = lagging_engine()
    item = request(0, [1, 2, 3], 20, stop_token_ids=(stop,))
    engine.add(item)
    answers, frames = Answers(), []
    while engine.has_work:
        output = engine.step()
        assert output is not None
        frames.append(output.stats.free_pages)
        answers.take(output)
    same(item, answers)
    assert answers.finish[0] == "stop"
    assert frames[-2] < frames[-1] == engine.stats().total_pages, "pages are free when the step on top is over"
    assert engine.is_idle


def test_a_cancelled_sequence_keeps_its_pages_until_its_step_is_over() -> None:
    engine = lagging_engine()
    engine.add(request(0, range(20), 30))
    engine.step()
    held = engine.stats().total_pages - engine.stats().free_pages
    engine.cancel(0)
    assert engine.stats().total_pages - engine.stats().free_pages == held
    assert engine.has_work
    drive(engine, Answers())
    assert engine.is_idle and engine.stats().free_pages == engine.stats().total_pages


def test_nobody_is_preempted_under_a_step_that_is_under_way() -> None:
    items = [request(number, range(number, number + 16), 40) for number in range(4)]
    engine = lagging_engine(num_pages=31)
    answers = serve(engine, *items)
    assert engine.stats().preemptions > 0
    for item in items:
        same(item, answers)


def test_nan_of_a_row_that_has_ended_is_never_read() -> None:
    """The step on top of the last one writes NaN into pages that are about to be free."""
    model = ToyModel()
    plain = alone(request(0, [1, 2, 3], 20)).tokens[0]
    stop = next(token for index, token in enumerate(plain) if index >= 3 and token not in plain[:index])
    engine = lagging_engine(model)
    model.embedding = model.embedding.clone()
    model.embedding[stop] = float("nan")
    answers = serve(engine, request(0, [1, 2, 3], 20, stop_token_ids=(stop,)))
    assert answers.finish[0] == "stop" and not answers.failures
    for index in range(2):
        assert torch.isfinite(engine._runner.kv.layer(index)[1:]).all()


def test_nan_logits_end_one_request() -> None:
    model = ToyModel()
    engine = lagging_engine(model)
    model.embedding[60] = float("nan")
    good = request(0, [1, 2, 3], 6)
    answers = serve(engine, good, request(1, [5, 60, 4], 6))
    assert answers.failures[1].kind == "nan_logits"
    same(good, answers)
    assert engine.stats().free_pages == engine.stats().total_pages
    for index in range(2):
        assert torch.isfinite(engine._runner.kv.layer(index)).all()


@pytest.mark.parametrize("is_memory", [True, False])
@pytest.mark.parametrize("at_launch", [True, False])
def test_a_step_that_fails_is_repeated_without_the_one_on_top(is_memory: bool, at_launch: bool) -> None:
    engine = lagging_engine(model := ToyModel())
    calls = []

    def explode(*_: object) -> None:
        calls.append(1)
        if len(calls) in (3, 4, 9):
            raise MemoryError if is_memory else RuntimeError("shape mismatch")

    if at_launch:
        build = engine._runner._builder.build
        engine._runner._builder.build = lambda plan, **fields: (explode(), build(plan, **fields))[1]
    else:
        model.on_forward = explode
    items = [request(number, range(number, number + 9), 12, sampling=KINDS[number]) for number in range(4)]
    answers = serve(engine, *items)
    assert not answers.failures
    for item in items:
        same(item, answers)


def test_a_lost_device_is_reported_when_the_step_is_read() -> None:
    model = ToyModel()
    engine = lagging_engine(model)
    engine.add(request(0, [1], 8))
    engine.step()

    def explode(batch: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    model.on_forward = explode
    with pytest.raises(DeviceError, match="illegal memory access"):
        for _ in range(3):
            engine.step()


def test_a_sequence_that_breaks_its_steps_fails_alone() -> None:
    engine = lagging_engine(model := ToyModel())

    def explode(batch) -> None:
        if (batch.token_ids == 77).any():
            raise RuntimeError("shape mismatch")

    model.on_forward = explode
    items = [request(number, range(number, number + 6), 10) for number in range(5)]
    answers = serve(engine, *items, request(9, [1, 77, 2], 10))
    assert answers.failures[9].kind == "step"
    for item in items:
        if 77 not in alone(item).tokens[item.request_id]:
            same(item, answers)


# ---------------------------------------------------------------------- random histories


@dataclass
class History:
    """Requests by the step before which they arrive, those that are cancelled, and passes that fail."""

    arrivals: list[tuple[int, Generate]] = field(default_factory=list)
    cancels: dict[int, list[int]] = field(default_factory=dict)
    failing_passes: frozenset[int] = frozenset()
    failing_launches: frozenset[int] = frozenset()
    is_memory: bool = False


@st.composite
def histories(draw: st.DrawFn) -> History:
    rng = random.Random(draw(st.integers(0, 2**32)))
    history = History(is_memory=draw(st.booleans()))
    shared = [rng.randrange(VOCAB) for _ in range(24)]
    for number in range(draw(st.integers(1, 6))):
        prompt = shared[: rng.choice([0, 8, 24])] + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 14))]
        constrained = rng.random() < 0.25
        item = request(
            number,
            prompt,
            rng.randint(1, 14),
            sampling=rng.choice(KINDS),
            stop_token_ids=tuple(rng.sample(range(VOCAB), rng.choice([0, 4, 12]))),
            grammar=GrammarSpec(str(rng.randint(1, 12))) if constrained else None,
            prompt_logprobs=rng.random() < 0.1,
        )
        history.arrivals.append((rng.randint(0, 25), item))
        if rng.random() < 0.2:
            history.cancels.setdefault(rng.randint(0, 40), []).append(number)
    passes = st.frozensets(st.integers(1, 40), max_size=4)
    history.failing_passes = draw(passes)
    history.failing_launches = draw(passes)
    return history


@settings(max_examples=max(ROUNDS // 8, 1), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    history=histories(), num_pages=st.integers(14, 40), budget=st.integers(3, 20), eagerness=st.sampled_from([0, 0.5])
)
def test_any_history_gives_the_answers_of_an_engine_that_waits(
    history: History, num_pages: int, budget: int, eagerness: float
) -> None:
    model = ToyModel()
    counts = {"passes": 0, "launches": 0}

    def fail(kind: str, numbers: frozenset[int]) -> None:
        counts[kind] += 1
        if counts[kind] in numbers:
            raise MemoryError if history.is_memory else RuntimeError("shape mismatch")

    model.on_forward = lambda batch: fail("passes", history.failing_passes)
    engine = lagging_engine(model, eagerness=eagerness, num_pages=num_pages, max_step_tokens=budget, max_running=4)
    build = engine._runner._builder.build
    engine._runner._builder.build = lambda plan, **fields: (
        fail("launches", history.failing_launches),
        build(plan, **fields),
    )[1]
    answers, step = Answers(), 0
    last = max(due for due, _ in history.arrivals)
    while step <= last or engine.has_work or not engine.is_idle:
        for due, item in history.arrivals:
            if due == step:
                engine.add(item)
        for number in history.cancels.get(step, []):
            engine.cancel(number)
        output = engine.step()
        if output is not None:
            answers.take(output)
        assert engine.check() == []
        step += 1
    assert engine.stats().free_pages == engine.stats().total_pages
    cancelled = {number for numbers in history.cancels.values() for number in numbers}
    for _, item in history.arrivals:
        number = item.request_id
        if number in answers.failures:
            # Only what fails again and again, alone, is given up.
            assert answers.failures[number].kind in ("step", "too_long")
            assert history.failing_passes or history.failing_launches or answers.failures[number].kind == "too_long"
        elif number in answers.finish:
            same(item, answers)
        else:
            assert number in cancelled
            assert alone(item).tokens.get(number, [])[: len(answers.tokens.get(number, []))] == answers.tokens.get(
                number, []
            )


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "_DEFER_S", (0.0,) * 12)

"""Which graphs are recorded, when, and that a replayed step is the step: on the CPU, with work that is done again."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from neuron.checkpoint.layout import GRAPH_SIZES
from neuron.engine.errors import DeviceError
from neuron.engine.parallel.messages import GraphKey
from neuron.engine.scheduler.scheduler import Chunk, StepPlan
from neuron.engine.scheduler.sequence import Sequence
from neuron.engine.step.cuda_graphs import StepGraphs, graph_sizes
from neuron.protocol import GrammarSpec

from tests.neuron.engine.graph_device import FakeGraphDevice, graph_engine
from tests.neuron.engine.step.harness import KINDS, PageWatch, drive, same, with_grammars
from tests.neuron.engine.toy import PAGE, Answers, ToyModel, request


def graphs(
    device: FakeGraphDevice | None = None, *, max_rows: int = 256, **calls
) -> tuple[StepGraphs, FakeGraphDevice]:
    device = device or FakeGraphDevice()
    nothing = lambda key: None  # noqa: E731
    return StepGraphs(
        device,
        max_rows=max_rows,
        max_context_len=4096,
        run=calls.get("run", nothing),
        warm_up=calls.get("warm_up", nothing),
    ), device


def record_everything(subject: StepGraphs) -> list[GraphKey]:
    order = []
    while (key := subject.next_key(is_idle=True)) is not None:
        assert subject.record(key)
        order.append(key)
    return order


# ---------------------------------------------------------------------- which, and in what order


@settings(deadline=None)
@given(max_rows=st.integers(1, 1024))
def test_sizes_end_with_what_may_run(max_rows: int) -> None:
    sizes = graph_sizes(max_rows)
    assert sizes == sorted(set(sizes)) and sizes[-1] == min(max_rows, 256)
    assert set(sizes[:-1]) == {size for size in GRAPH_SIZES if size < sizes[-1]}


def test_a_few_are_recorded_at_load_and_all_others_largest_first() -> None:
    subject, device = graphs()
    for key in subject.keys_at_load():
        subject.record(key)
    assert [key.num_rows for key in subject.captured] == [256, 64, 16, 4, 1]
    rest = record_everything(subject)
    tokens = [key.num_rows for key in rest if key.ends_with == "tokens"]
    logits = [key.num_rows for key in rest if key.ends_with == "logits"]
    assert tokens == [192, 128, 96, 48, 32, 24, 8, 2]
    assert logits == list(reversed(GRAPH_SIZES))
    assert rest == [key for key in rest if key.ends_with == "tokens"] + [
        key for key in rest if key.ends_with == "logits"
    ]
    assert device.num_pools == 1, "all share one pool"
    assert len(device.events) == 2 * len(GRAPH_SIZES)


@settings(deadline=None, max_examples=20)
@given(max_rows=st.integers(1, 300), data=st.data())
def test_the_graphs_of_loading_cover_every_batch_and_the_smallest_that_fits_is_taken(max_rows: int, data) -> None:
    subject, _ = graphs(max_rows=max_rows)
    for key in subject.keys_at_load():
        subject.record(key)
    for key in list(subject._queue):
        if data.draw(st.booleans()):
            subject.record(key)
    for num_rows in range(1, min(max_rows, 256) + 1):
        found = subject.find(num_rows, 100, "tokens")
        assert found is not None and found.num_rows >= num_rows and found.num_rows <= 4 * num_rows
        between = [key for key in subject.captured if num_rows <= key.num_rows < found.num_rows]
        assert all(key.ends_with == "logits" for key in between)
    assert subject.find(min(max_rows, 256) + 1, 100, "tokens") is None
    assert subject.find(1, 4097, "tokens") is None, "a longer context than was recorded for"


def test_what_is_missed_often_is_recorded_although_the_engine_is_never_idle() -> None:
    subject, _ = graphs()
    for key in subject.keys_at_load():
        subject.record(key)
    assert subject.next_key(is_idle=False) is None
    for _ in range(64):
        assert subject.find(2, 10, "logits") is None
    assert subject.next_key(is_idle=False) == GraphKey(2, 4096, "logits")
    for _ in range(65):
        assert subject.find(7, 10, "tokens") == GraphKey(16, 4096, "tokens"), "with padding, meanwhile"
    key = subject.next_key(is_idle=False)
    assert key == GraphKey(8, 4096, "tokens")
    assert subject.record(key)
    assert subject.find(7, 10, "tokens") == key


# ---------------------------------------------------------------------- what recording needs, and its end


def test_work_is_warmed_up_once_before_it_is_recorded() -> None:
    calls = []
    subject, device = graphs(run=lambda key: calls.append("run"), warm_up=lambda key: calls.append("warm up"))
    subject.record(subject.keys_at_load()[0])
    assert calls == ["warm up"] and device.events == ["record 1"], "recording itself computes nothing here"
    subject.replay(subject.keys_at_load()[0])
    assert calls == ["warm up", "run"]


def test_without_memory_a_size_goes_without_and_others_do_not() -> None:
    subject, device = graphs()
    device.refuses = {1}
    keys = subject.keys_at_load()
    for key in keys:
        subject.record(key)
    assert subject.captured == keys[1:]
    assert subject.find(200, 10, "tokens") is None and subject.find(64, 10, "tokens") is not None
    assert keys[0] not in record_everything(subject), "it is not tried again and again"


@pytest.mark.parametrize("make", [RuntimeError, torch.AcceleratorError])
def test_where_recording_does_not_work_steps_go_on_without(make: Callable[[str], Exception]) -> None:
    device = FakeGraphDevice()
    device.fault = make("CUDA error: operation not permitted when stream is capturing")
    subject, _ = graphs(device)
    assert not subject.record(subject.keys_at_load()[0])
    assert subject.next_key(is_idle=True) is None
    assert subject.find(1, 1, "tokens") is None


def test_a_device_that_is_lost_while_recording_is_reported() -> None:
    def run(key: GraphKey) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    subject, _ = graphs(warm_up=run)
    with pytest.raises(DeviceError):
        subject.record(subject.keys_at_load()[0])


def test_a_rank_that_fails_while_the_others_are_in_a_collective_is_not_taken_for_short_of_memory() -> None:
    def warm_up(key: GraphKey) -> None:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        except torch.OutOfMemoryError as exc:
            raise DeviceError("rank_fault", "warming up failed on this rank") from exc

    subject, _ = graphs(warm_up=warm_up)
    with pytest.raises(DeviceError, match="this rank"):
        subject.record(subject.keys_at_load()[0])


def test_graphs_are_given_up_youngest_first_then_their_pool_and_can_be_recorded_again() -> None:
    subject, device = graphs()
    for key in subject.keys_at_load():
        subject.record(key)
    device.events.clear()
    subject.drop()
    assert device.events == [*(f"reset {number}" for number in (5, 4, 3, 2, 1)), "release pool"]
    assert subject.captured == [] and subject.find(1, 1, "tokens") is None
    assert len(record_everything(subject)) == 2 * len(GRAPH_SIZES)
    assert device.num_pools == 2
    subject.close()
    assert subject.next_key(is_idle=True) is None and subject.captured == []


def test_closing_gives_graphs_up_before_the_other_ranks_are_let_go() -> None:
    engine, device = graph_engine()
    engine.work_while_idle()

    class Leader:
        def close(self) -> None:
            device.events.append("leader closed")

    engine._runner._leader = Leader()  # type: ignore[assignment]
    engine.close()
    assert device.events[-3:] == ["reset 1", "release pool", "leader closed"]


# ---------------------------------------------------------------------- replayed steps


def captured_engine(**fields):
    engine, device = graph_engine(**fields)
    with_grammars(engine)
    PageWatch(engine)
    while engine.has_idle_work:
        engine.work_while_idle()
    return engine, device


def test_every_kind_of_row_is_replayed_and_gives_the_answer_of_an_engine_without_graphs() -> None:
    engine, _ = captured_engine()
    rng = random.Random(3)
    items = [
        request(
            number,
            [rng.randrange(101) for _ in range(rng.randint(1, 20))],
            rng.randint(3, 14),
            sampling=KINDS[number % len(KINDS)],
            grammar=GrammarSpec("8") if number % 5 == 4 else None,
        )
        for number in range(12)
    ]
    answers = Answers()
    for item in items:
        engine.add(item)
        output = engine.step()
        if output is not None:
            answers.take(output)
    drive(engine, answers)
    for item in items:
        same(item, answers)
    graphs = engine._runner.graphs
    assert graphs.num_replays > 10 and graphs.num_misses == 0
    assert {key.ends_with for key in graphs.captured} == {"tokens", "logits"}


def test_plain_rows_are_sampled_inside_the_graph() -> None:
    engine, _ = captured_engine()
    engine._runner._sampler.draw = lambda *_, **__: pytest.fail("sampled outside") if engine._num_steps else None
    items = [request(0, [1, 2, 3], 9, sampling=KINDS[2]), request(1, [4, 5], 9)]
    # The prefill is sampled as ever.
    del engine._runner._sampler.draw
    answers = Answers()
    for item in items:
        engine.add(item)
    answers.take(engine.step())
    engine._runner._sampler.draw = lambda *_, **__: pytest.fail("sampled outside of the graph")
    drive(engine, answers)
    for item in items:
        same(item, answers)


def test_padding_writes_to_page_0_alone_and_is_never_sampled_out() -> None:
    model = ToyModel()
    engine, _ = captured_engine(model=model)
    items = [request(number, [number, 50, 7], 8) for number in range(3)]
    written: set[int] = set()
    sizes = set()

    def look(batch) -> None:
        sizes.add((batch.num_tokens, int((batch.context_lens > 0).sum())))
        padding = batch.context_lens == 0
        if batch.num_decodes == batch.num_tokens:
            written.update(batch.slot_mapping[padding].tolist())
            assert (batch.slot_mapping[~padding] >= PAGE).all()

    answers = Answers()
    for item in items:
        engine.add(item)
    model.on_forward = look
    drive(engine, answers)
    assert (4, 3) in sizes, "three sequences run in a graph of four"
    assert written == {0}
    assert set(answers.finish) == {0, 1, 2}
    for item in items:
        same(item, answers)


def test_nan_in_page_0_reaches_nobody() -> None:
    engine, _ = captured_engine()
    items = [request(number, [number, 50, 7], 8) for number in range(3)]
    for index in range(2):
        engine._runner.kv.layer(index)[0] = float("nan")
    answers = Answers()
    for item in items:
        engine.add(item)
    drive(engine, answers)
    for item in items:
        same(item, answers)


def test_nan_logits_of_a_replayed_step_end_one_request() -> None:
    model = ToyModel()
    engine, _ = captured_engine(model=model)
    good, bad = request(0, [1, 2, 3], 8), request(1, [4, 5], 8)
    first = Answers()
    engine.add(good)
    engine.add(bad)
    first.take(engine.step())
    model.embedding = model.embedding.clone()
    model.embedding[first.tokens[1][0]] = float("nan")
    if first.tokens[0][0] == first.tokens[1][0]:
        pytest.fail("the test wants two different tokens")
    drive(engine, first)
    assert first.failures[1].kind == "nan_logits"
    assert first.finish[0] == "length"
    assert engine.stats().free_pages == engine.stats().total_pages


def test_a_shortage_gives_the_graphs_up_and_they_come_back_when_idle() -> None:
    model = ToyModel()
    engine, _ = captured_engine(model=model)
    calls = []

    def explode(batch) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError

    model.on_forward = explode
    items = [request(number, [number, 50, 7], 8) for number in range(3)]
    answers = Answers()
    for item in items:
        engine.add(item)
    drive(engine, answers)
    for item in items:
        same(item, answers)
    assert engine._runner.graphs.num_misses > 0 and engine.has_idle_work


# ---------------------------------------------------------------------- the key says it all


def static_view(engine, plan: StepPlan, key: GraphKey):
    """Every Python number and address that kernels of a replayed step see of its batch."""
    builder = engine._runner._builder
    builder.build(plan, graph_rows=key.num_rows)
    batch = builder.graph_batch(key.num_rows, key.max_context_len)
    tensors = {
        name: (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
        for name in batch.__slots__
        if isinstance(value := getattr(batch, name), torch.Tensor)
    }
    numbers = {name: getattr(batch, name) for name in batch.__slots__ if name not in tensors}
    return tensors, numbers


def plan_of(rng: random.Random, num_rows: int) -> StepPlan:
    chunks = []
    for row in range(num_rows):
        length = rng.randint(1, 150)
        sequence = Sequence(request(row, [rng.randrange(101) for _ in range(length)]), row)
        sequence.pages.extend(rng.sample(range(1, 60), -(-length // PAGE)))
        chunks.append(Chunk(sequence, length - 1, 1, 1))
    return StepPlan(1, chunks, num_rows, num_rows)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32), num_rows=st.integers(1, 8), other=st.integers(1, 8))
def test_steps_of_one_key_look_the_same_to_a_launcher(seed: int, num_rows: int, other: int) -> None:
    engine, _ = ENGINE
    rng = random.Random(seed)
    subject = engine._runner.graphs
    first, second = plan_of(rng, num_rows), plan_of(rng, other)
    keys = [subject.find(plan.num_decodes, 150, "tokens") for plan in (first, second)]
    views = [static_view(engine, plan, key) for plan, key in zip((first, second), keys, strict=True)]
    assert (views[0] == views[1]) == (keys[0] == keys[1])


ENGINE = captured_engine()  # one for all examples: only addresses are looked at

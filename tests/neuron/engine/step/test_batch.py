"""A step plan as the tensors that a model runs on."""

from __future__ import annotations

import torch
from neuron.engine.scheduler.scheduler import Chunk, StepPlan
from neuron.engine.scheduler.sequence import Sequence
from neuron.engine.step.batch import BatchBuilder
from neuron.protocol import Generate, SamplingParams

from tests.neuron.engine.lazy_stream import LazyStream


def test_an_unpacked_batch_is_the_batch_that_was_packed() -> None:
    def builder() -> BatchBuilder:
        return BatchBuilder(max_tokens=64, max_sequences=8, max_pages=16, page_size=4, device=torch.device("cpu"))

    chunks = []
    for number, (start, length, samples) in enumerate([(7, 1, True), (0, 9, False), (4, 3, True)]):
        sequence = Sequence(Generate(number, list(range(20)), SamplingParams(), 4), number)
        sequence.pages.extend(range(1 + 5 * number, 6 + 5 * number))
        chunks.append(Chunk(sequence, start, length, samples))
    ours, theirs = builder(), builder()
    batch = ours.build(StepPlan(1, chunks, 1, 13))
    copy = theirs.unpack(ours.pack(batch))
    for name in batch.__slots__:
        expected, got = getattr(batch, name), getattr(copy, name)
        assert torch.equal(expected, got) if isinstance(expected, torch.Tensor) else expected == got, name


def sequence_of(number: int, *, num_tokens: int = 20, num_pages: int = 5) -> Sequence:
    sequence = Sequence(Generate(number, list(range(100 * number, 100 * number + num_tokens)), SamplingParams(), 4), 1)
    sequence.pages.extend(range(1 + 5 * number, 1 + 5 * number + num_pages))
    return sequence


def new_builder(stream: LazyStream | None = None) -> BatchBuilder:
    cpu = torch.device("cpu")
    return BatchBuilder(max_tokens=64, max_sequences=8, max_pages=16, page_size=4, device=cpu, stream=stream)


def test_tokens_positions_and_slots_follow_the_pages_of_each_sequence() -> None:
    first, second = sequence_of(1), sequence_of(2)
    batch = new_builder().build(StepPlan(1, [Chunk(first, 9, 1, 1), Chunk(second, 2, 5, 0)], 1, 6))
    assert batch.token_ids.tolist() == [109, 202, 203, 204, 205, 206]
    assert batch.positions.tolist() == [9, 2, 3, 4, 5, 6]
    pages = [[6, 7, 8], [11, 12, 13]]
    slots = [pages[0][2] * 4 + 1, *(pages[1][at // 4] * 4 + at % 4 for at in range(2, 7))]
    assert batch.slot_mapping.tolist() == slots
    assert batch.query_start.tolist() == [0, 1, 6] and batch.context_lens.tolist() == [10, 7]
    assert batch.page_tables.tolist() == pages
    assert (batch.max_query_len, batch.max_context_len, batch.num_decodes) == (5, 10, 1)


def test_logits_are_of_the_last_tokens_that_are_sampled() -> None:
    chunks = [Chunk(sequence_of(0), 0, 4, 0), Chunk(sequence_of(1), 0, 5, 3), Chunk(sequence_of(2), 0, 2, 1)]
    batch = new_builder().build(StepPlan(1, chunks, 0, 11))
    assert batch.logits_indices.tolist() == [6, 7, 8, 10]


def test_a_token_that_is_still_on_the_device_is_named_by_its_row() -> None:
    known, carried = Chunk(sequence_of(1), 9, 1, 1), Chunk(sequence_of(2, num_pages=6), 20, 1, 1, carry_row=3)
    batch = new_builder().build(StepPlan(1, [known, carried], 2, 2, is_chained=True))
    assert batch.token_ids.tolist() == [109, -4]


def test_rows_that_a_graph_has_too_many_see_nothing_and_write_to_page_0() -> None:
    builder = new_builder()
    builder.build(StepPlan(1, [Chunk(sequence_of(number), 9, 1, 1) for number in range(4)], 4, 4), graph_rows=4)
    batch = builder.build(StepPlan(2, [Chunk(sequence_of(1), 10, 1, 1)], 1, 1), graph_rows=4)
    assert batch.token_ids.tolist() == [110, 0, 0, 0] and batch.slot_mapping.tolist()[1:] == [0, 0, 0]
    assert batch.context_lens.tolist() == [11, 0, 0, 0] and batch.num_decodes == 4
    assert not batch.page_tables[1:].any(), "nothing is left of the step before"
    assert batch.logits_indices.tolist() == [0, 1, 2, 3]


def test_tables_follow_pages_that_grow_change_or_leave() -> None:
    builder, sequence, other = new_builder(), sequence_of(1, num_pages=3), sequence_of(2, num_pages=3)
    first = builder.build(StepPlan(1, [Chunk(sequence, 8, 1, 1), Chunk(other, 8, 1, 1)], 2, 2))
    assert first.page_tables.tolist() == [[6, 7, 8], [11, 12, 13]]
    sequence.pages[:] = type(sequence.pages)("i", [1, 2])
    sequence.pages = type(sequence.pages)("i", [1, 2, 3])
    second = builder.build(StepPlan(2, [Chunk(other, 9, 1, 1), Chunk(sequence, 9, 1, 1)], 2, 2))
    assert second.page_tables.tolist() == [[11, 12, 13], [1, 2, 3]]
    other.pages.append(14)
    third = builder.build(StepPlan(3, [Chunk(other, 12, 1, 1)], 1, 1))
    assert third.page_tables.tolist() == [[11, 12, 13, 14]]


def test_a_batch_is_not_overwritten_before_the_device_has_read_it() -> None:
    stream = LazyStream()
    builder = new_builder(stream)
    seen: list[list[int]] = []
    for number in (1, 2, 3):
        batch = builder.build(StepPlan(number, [Chunk(sequence_of(number), 9, 1, 1)], 1, 1))
        stream.submit(lambda batch=batch: seen.append(batch.token_ids.tolist()))  # type: ignore[misc]
    stream.record().wait()
    assert seen == [[109], [209], [309]]


def test_each_step_of_one_builder_is_what_a_new_builder_makes_of_it() -> None:
    """Views are kept from step to step where extents are the same, and only there."""
    sequences = [sequence_of(number) for number in range(3)]

    def decodes(start: int, *of: int) -> StepPlan:
        return StepPlan(1, [Chunk(sequences[number], start, 1, 1) for number in of], len(of), len(of))

    mixed = [Chunk(sequences[0], 9, 1, 1), Chunk(sequences[1], 2, 5, 0), Chunk(sequences[2], 0, 4, 1)]
    cut = StepPlan(1, [Chunk(sequences[0], 6, 1, 0), Chunk(sequences[1], 7, 1, 1)], 2, 2)
    plans = [decodes(5, 0, 1), decodes(6, 0, 1), decodes(6, 2, 0), decodes(8, 0, 1), decodes(8, 0, 1, 2)]
    plans += [StepPlan(1, mixed, 1, 10), decodes(9, 1), cut, decodes(10, 1, 0)]
    builder = new_builder()
    for number, plan in enumerate(plans):
        batch, expected = builder.build(plan), new_builder().build(plan)
        for name in batch.__slots__:
            got, right = getattr(batch, name), getattr(expected, name)
            assert torch.equal(got, right) if isinstance(right, torch.Tensor) else got == right, (number, name)
        assert batch.query_start.tolist()[-1] == batch.num_tokens
    assert builder.build(cut).logits_indices.tolist() == [1]
    assert builder.build(decodes(10, 1, 0)).logits_indices.tolist() == [0, 1]

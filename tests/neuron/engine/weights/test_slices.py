from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from neuron.engine.weights.slices import runs_of


@st.composite
def slices(draw: st.DrawFn) -> tuple[list[int], tuple[slice, ...]]:
    shape = draw(st.lists(st.integers(1, 5), max_size=4))
    source = []
    for size in shape:
        start = draw(st.integers(0, size))
        source.append(slice(start, draw(st.integers(start, size))))
    return shape, tuple(source)


@given(slices())
def test_runs_are_the_elements_of_the_slice_in_order(case: tuple[list[int], tuple[slice, ...]]) -> None:
    shape, source = case
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape)
    found = [
        first + byte
        for runs in runs_of(shape, source, offset=100, item_bytes=1)
        for first in range(runs.offset - 100, runs.offset - 100 + runs.num_runs * runs.pitch, runs.pitch)
        for byte in range(runs.run_bytes)
    ]
    assert found == tensor[source].flatten().tolist()


def test_whole_rows_are_one_run_and_columns_are_one_for_each_row() -> None:
    (rows,) = runs_of((10, 6), (slice(2, 7), slice(0, 6)), offset=1000, item_bytes=2)
    assert (rows.offset, rows.num_runs, rows.run_bytes) == (1000 + 2 * 12, 1, 60)
    (columns,) = runs_of((10, 6), (slice(2, 7), slice(3, 6)), offset=1000, item_bytes=2)
    assert (columns.offset, columns.num_runs, columns.run_bytes, columns.pitch) == (1000 + 30, 5, 6, 12)

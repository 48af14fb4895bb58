"""Slices of a tensor within its file: as few runs of bytes at equal distances as describe them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from neuron.engine.weight_slices import Slices


@dataclass(frozen=True, slots=True)
class Runs:
    """`num_runs` runs of `run_bytes` bytes, the first at `offset` of the file and each `pitch` after the last."""

    offset: int
    num_runs: int
    run_bytes: int
    pitch: int

    @property
    def num_bytes(self) -> int:
        return self.num_runs * self.run_bytes


def runs_of(shape: Sequence[int], source: Slices, *, offset: int, item_bytes: int) -> Iterator[Runs]:
    """The runs of a slice of a row-major tensor whose data begins at `offset`, in the order of its elements.

    A slice of whole rows is one run; columns of a matrix are one run for each row, at equal distances.
    """
    if not all(part.start < part.stop for part in source):
        return
    # The last dimension that is cut decides how long a run is: everything behind it is whole.
    cut = max(
        (index for index, part in enumerate(source) if part.stop - part.start != shape[index]),
        default=0,
    )
    strides = [math.prod(shape[index + 1 :]) * item_bytes for index in range(len(shape))]
    if not shape:
        yield Runs(offset, 1, item_bytes, item_bytes)
        return
    run_bytes = (source[cut].stop - source[cut].start) * strides[cut]
    start = offset + source[cut].start * strides[cut]
    if cut == 0:
        yield Runs(start, 1, run_bytes, run_bytes)
        return
    # Rows of the dimension before the cut follow each other at its stride; dimensions before that are walked.
    rows = source[cut - 1]
    for outer in itertools.product(*(range(part.start, part.stop) for part in source[: cut - 1])):
        first = start + sum(index * stride for index, stride in zip(outer, strides, strict=False))
        yield Runs(first + rows.start * strides[cut - 1], rows.stop - rows.start, run_bytes, strides[cut - 1])

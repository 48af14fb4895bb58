"""Headers that lie. The oracle is the format's own library: what is accepted here it accepts, with equal views."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from neuron.checkpoint.errors import CheckpointError
from neuron.checkpoint.safetensors_header import BITS, MAX_DIMENSIONS, MAX_HEADER_BYTES, parse_header, read_header
from safetensors import SafetensorError, deserialize

from tests.neuron.checkpoint.harness import LIES, entry, packed
from tests.neuron.rounds import ROUNDS


def refusal_of(content: bytes, folder: Path) -> CheckpointError:
    file = folder / "model.safetensors"
    file.write_bytes(content)
    descriptor = os.open(file, os.O_RDONLY)
    try:
        with pytest.raises(CheckpointError) as caught:
            read_header(descriptor, file.name)
    finally:
        os.close(descriptor)
    assert caught.value.file == file.name and file.name in caught.value.message
    assert len(caught.value.message) < 2_000
    return caught.value


@pytest.mark.parametrize("lie", LIES)
def test_H14_a_header_that_lies_is_refused_by_name(lie: str, tmp_path: Path) -> None:
    content, why = LIES[lie]
    error = refusal_of(content, tmp_path)
    with pytest.raises(CheckpointError, match=why):
        raise error


def test_H14_a_header_of_a_hundred_megabytes_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with file.open("wb") as stream:
        stream.write((100 * 2**20).to_bytes(8, "little"))
        stream.truncate(8 + 100 * 2**20)
    descriptor = os.open(file, os.O_RDONLY)
    with pytest.raises(CheckpointError, match=rf"a header of 104857600 bytes, and at most {MAX_HEADER_BYTES} are read"):
        read_header(descriptor, file.name)
    os.close(descriptor)


def test_H14_dtypes_are_those_of_the_library() -> None:
    for dtype, bits in BITS.items():
        content = packed({"t": entry(dtype, [8], [0, bits])}, bits)
        deserialize(content)
        assert [tensor.num_bytes for tensor in accepted(content) or ()] == [bits]


# ---------------------------------------------------------------- the oracle


def accepted(content: bytes) -> list[Any] | None:
    """The tensors that this module finds in a file of this content, None where it refuses it."""
    length = int.from_bytes(content[:8], "little")
    try:
        return parse_header(content[8 : 8 + length], data_bytes=len(content) - 8 - length, file="f")
    except CheckpointError:
        return None


def is_the_same_there(content: bytes) -> bool:
    """Whether it is accepted here; then the library accepts it too, and sees the same."""
    found = accepted(content)
    if found is None:
        return False
    theirs = {name: (view["dtype"], list(view["shape"]), bytes(view["data"])) for name, view in deserialize(content)}
    ours = {
        tensor.name: (
            tensor.dtype,
            list(tensor.shape),
            content[tensor.offset : tensor.offset + tensor.num_bytes],
        )
        for tensor in found
    }
    assert ours == theirs
    return True


def said_by_the_library(content: bytes) -> bool:
    try:
        deserialize(content)
    except SafetensorError:
        return False
    return True


odd_numbers = st.one_of(
    st.integers(-2, 9),
    st.sampled_from([0.0, 1.0, -0.0, True, False, None, "1", [], {}, 2**31, 2**32, 2**62, 2**63, 2**64, 10**30]),
)
odd_entries = st.one_of(
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from([*BITS, "F33", "f32", "", None, 3]),
            "shape": st.one_of(st.lists(odd_numbers, max_size=4), odd_numbers),
            "data_offsets": st.one_of(st.tuples(odd_numbers, odd_numbers).map(list), st.lists(odd_numbers, max_size=3)),
        },
        optional={"more": odd_numbers},
    ),
    odd_numbers,
)
names = st.one_of(
    st.sampled_from(["a", "b", "__metadata__", "", "\u00e9", "\U0001f600", 'quo"te']), st.text(max_size=3)
)


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """Files that are right, or wrong in one or two places: most lies are near the truth."""
    at, header = 0, {}
    for name in draw(st.lists(names.filter("__metadata__".__ne__), unique=True, max_size=4)):
        dtype = draw(st.sampled_from(sorted(BITS)))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        num_bits = BITS[dtype]
        for size in shape:
            num_bits *= size
        if num_bits % 8:
            continue
        header[name] = entry(dtype, shape, [at, at + num_bits // 8])
        at += num_bits // 8
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2))
    for _ in range(draw(st.integers(0, 2))):
        kind = draw(st.integers(0, 3))
        if kind == 0:
            header[draw(names)] = draw(odd_entries)
        elif header and kind == 1:
            victim = header[draw(st.sampled_from(sorted(header)))]
            if isinstance(victim, dict):
                key = draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))
                victim[key] = draw(st.one_of(odd_numbers, st.lists(odd_numbers, max_size=3)))
        elif header and kind == 2:
            header.pop(draw(st.sampled_from(sorted(header))))
        else:
            at = max(0, at + draw(st.integers(-9, 9)))
    items = list(header.items())
    text = json.dumps(dict(draw(st.permutations(items))), ensure_ascii=draw(st.booleans())).encode()
    text = draw(st.sampled_from([b"", b"  ", b"\n"])) + text + draw(st.sampled_from([b"", b"   ", b"\0", b"x"]))
    if draw(st.integers(0, 9)) == 0:
        position = draw(st.integers(0, len(text)))
        text = text[:position] + draw(st.binary(max_size=3)) + text[position + draw(st.integers(0, 2)) :]
    return len(text).to_bytes(8, "little") + text + bytes(range(256)) * (at // 256) + bytes(range(at % 256))


@settings(max_examples=10 * ROUNDS, deadline=None)
@given(files())
@example(packed({"a": entry("F4", [2], [0, 1])}, 1))
@example(packed(b'{"t":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', 0))
def test_H14_what_is_accepted_the_library_accepts_and_sees_alike(content: bytes) -> None:
    is_the_same_there(content)


@settings(max_examples=10 * ROUNDS, deadline=None)
@given(st.binary(max_size=120).map(lambda text: packed(text, 0)))
def test_H14_bytes_that_nobody_wrote_never_raise_anything_else(content: bytes) -> None:
    is_the_same_there(content)


def test_H14_files_that_the_library_writes_are_accepted(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save

    tensors = {
        "scalar": torch.tensor(1.0),
        "none": torch.zeros(0, 3),
        "matrix": torch.ones(3, 4, dtype=torch.bfloat16),
        "whole": torch.arange(5),
        "\u00e9": torch.ones(1),
    }
    assert is_the_same_there(save(tensors, metadata={"format": "pt"}))
    assert is_the_same_there(save({}))


def test_H14_most_lies_are_lies_to_the_library_too() -> None:
    """And those that are not are listed: where more than one reading would do, or memory is at stake."""
    only_here = {name for name, (content, _) in LIES.items() if said_by_the_library(content)}
    assert only_here <= {"more is said", "name twice", "name twice, once escaped", "metadata null", "many dimensions"}
    assert "name twice" in only_here
    assert MAX_DIMENSIONS >= 8

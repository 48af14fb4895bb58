"""Headers of GGUF files: what they say, and what is refused before anything of that size is read."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from neuron.checkpoint.errors import CheckpointError
from neuron.checkpoint.gguf.header import Array, GgufHeader, read_header

from tests.neuron.checkpoint.gguf.writer import gguf_bytes, header_of, model_metadata, text

METADATA = {
    "general.architecture": "llama",
    "a.flag": True,
    "a.number": 7,
    "a.float": 0.5,
    "a.list": [1, 2, 3],
    "a.words": ["x", "", b"\xff\xfe"],
    "a.large": ("u64", 2**40),
}
TENSORS = {
    "token_embd.weight": ("F16", (3, 32), bytes(range(192))),
    "blk.0.attn_q.weight": ("Q4_0", (2, 64), bytes(72)),
    "output_norm.weight": ("F32", (4,), bytes(16)),
}
WHOLE = gguf_bytes(METADATA, TENSORS)


def read(data: bytes, folder: Path) -> GgufHeader:
    path = folder / "x.gguf"
    path.write_bytes(data)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return read_header(descriptor, "x.gguf")
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [32, 256])
def test_metadata_and_tensors_are_read(tmp_path: Path, version: int, alignment: int) -> None:
    metadata = METADATA | ({} if alignment == 32 else {"general.alignment": alignment})
    header = read(gguf_bytes(metadata, TENSORS, version=version, alignment=alignment), tmp_path)
    assert (header.version, header.alignment) == (version, alignment)
    values = header.metadata
    assert (values["a.flag"], values["a.number"], values["a.float"], values["a.large"]) == (True, 7, 0.5, 2**40)
    numbers, words = values["a.list"], values["a.words"]
    assert isinstance(numbers, Array) and numbers.numbers() == [1, 2, 3]
    assert isinstance(words, Array) and words.strings() == ["x", "", "\ufffd\ufffd"]
    with pytest.raises(ValueError, match="an array of string"):
        words.numbers()
    assert [(each.name, each.dtype, each.shape, each.num_bytes) for each in header.tensors] == [
        ("token_embd.weight", "F16", (3, 32), 192),
        ("blk.0.attn_q.weight", "Q4_0", (2, 64), 72),
        ("output_norm.weight", "F32", (4,), 16),
    ]
    first, second, _ = header.tensors
    assert first.offset == header.data_start and second.offset % alignment == 0


def described(number: int = 0, name: bytes = b"a", sizes: tuple[int, ...] = (4,), offset: int = 0) -> bytes:
    shape = b"".join(struct.pack("<Q", size) for size in sizes)
    return text(name) + struct.pack("<I", len(sizes)) + shape + struct.pack("<IQ", number, offset)


def head(num_tensors: int, num_keys: int, *rest: bytes, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys) + b"".join(rest) + bytes(64)


DAMAGED: dict[str, tuple[Callable[[], bytes], str]] = {
    "no magic": (lambda: b"GGML" + WHOLE[4:], "is not a GGUF file"),
    "short": (lambda: WHOLE[:20], "is not a GGUF file"),
    "version 1": (lambda: WHOLE[:4] + struct.pack("<I", 1) + WHOLE[8:], "version 1 is not read, only 2 and 3 are"),
    "big-endian": (lambda: WHOLE[:4] + struct.pack(">I", 3) + WHOLE[8:], "big-endian GGUF files are not read"),
    "many keys": (lambda: head(0, 2**60), "the number of metadata entries is 1152921504606846976"),
    "many tensors": (lambda: head(900_000, 0), "the number of tensors is 900000, which would end at byte"),
    "a key twice": (lambda: header_of({"k": 1}, {})[:-4] and head(0, 2, text("k"), struct.pack("<IB", 0, 1), text("k"),
                    struct.pack("<IB", 0, 1)), "the key k comes twice"),
    "a type of value": (lambda: head(0, 1, text("k"), struct.pack("<IB", 99, 1)), "metadata k has the unknown type 99"),
    "a long string": (lambda: head(0, 1, text("k"), struct.pack("<IQ", 8, 2**50)), "the length of metadata k"),
    "a long array": (lambda: head(0, 1, text("k"), struct.pack("<IIQ", 9, 4, 2**40)), "the length of metadata k"),
    "an array of strings": (
        lambda: head(0, 1, text("k"), struct.pack("<IIQ", 9, 8, 2), struct.pack("<Q", 2**62)),
        "metadata k would end at byte",
    ),
    "nested arrays": (
        lambda: head(0, 1, text("k"), struct.pack("<I", 9), struct.pack("<IQ", 9, 1) * 8),
        "nested more than 4 deep",
    ),
    "a flag": (lambda: head(0, 1, text("k"), struct.pack("<IB", 7, 2)), "metadata k: the flag is 2"),
    "an alignment": (lambda: gguf_bytes({"general.alignment": 48}, {}), "general.alignment 48 is no power of two"),
    "an alignment of 0": (lambda: gguf_bytes({"general.alignment": 0}, {}), "general.alignment 0"),
    "a tensor twice": (lambda: head(2, 0, described(), described(offset=32)), "a tensor is described twice"),
    "dimensions": (lambda: head(1, 0, described(sizes=(1,) * 5)), "a shape of 5 dimensions, and at most 4 exist"),
    "an empty tensor": (lambda: head(1, 0, described(sizes=(4, 0))), r"the shape \[0, 4\] is none"),
    "a huge tensor": (lambda: head(1, 0, described(sizes=(2**40, 2**40))), "is none that a tensor can have"),
    "a type": (lambda: head(1, 0, described(77)), "the type number 77 is unknown"),
    "a type of codes": (lambda: head(1, 0, described(34)), "type TQ1_0 is not supported for weights"),
    "a row of no blocks": (lambda: head(1, 0, described(2, sizes=(33, 2))), "rows of 33 are no blocks of Q4_0"),
    "a name": (lambda: head(1, 0, described(name=b"\xff")), "the name of tensor 0 is not UTF-8"),
    "an offset": (lambda: head(1, 0, described(offset=7)), "the offset 7 of a tensor is no multiple of the alignment"),
    "a gap": (lambda: head(1, 0, described(offset=32)), "leaves a gap before it: 0 is due"),
    "an overlap": (lambda: head(2, 0, described(sizes=(9,)), described(name=b"b", offset=32)), "overlaps the one"),
    "cut data": (lambda: WHOLE[:-40], "is truncated: it ends"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_header_is_refused_by_its_field(tmp_path: Path, case: str) -> None:
    make, message = DAMAGED[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        read(make(), tmp_path)
    assert caught.value.file == "x.gguf"


@pytest.mark.parametrize("length", [25, 60, 120, 200, 300, 400])
def test_a_header_that_is_cut_anywhere_is_refused(tmp_path: Path, length: int) -> None:
    with pytest.raises(CheckpointError):
        read(WHOLE[:length], tmp_path)


@settings(max_examples=1_000 if "CORTEX_ROUNDS" in os.environ else 60, deadline=None)
@given(data=st.data())
def test_changed_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    found = bytearray(gguf_bytes(model_metadata(vocab=5), TENSORS))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(found) - 9))
        change = data.draw(st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([b"\xff" * 8, bytes(8)])))
        found[at : at + len(change)] = change
    try:
        header = read(bytes(found), tmp_path_factory.getbasetemp())
    except CheckpointError as exc:
        assert exc.file == "x.gguf"
    else:
        assert all(tensor.offset + tensor.num_bytes <= len(found) for tensor in header.tensors)

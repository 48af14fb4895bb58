"""GGUF headers, read as strictly as llama.cpp reads them, or more so.

A file is the magic, a version, the numbers of tensors and of metadata entries, the entries (key, type, value), a
description of each tensor (name, dimensions fastest first, type, offset) and the data, where tensors follow each other
in the order of their descriptions, each padded to the file's alignment. All is little-endian here.
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and `gguf_init_from_file` of ggml 0.25.)

A vocabulary is hundreds of thousands of strings: arrays stay the bytes that they are until somebody asks for them.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass

from neuron.checkpoint.block_types import REFUSED_TYPES, TYPE_OF_NUMBER
from neuron.checkpoint.errors import CheckpointError
from neuron.checkpoint.safetensors_header import TensorHeader

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 128 * 2**20
"""Of one file. A vocabulary of 262,144 tokens with its merges takes about a tenth of it."""
MAX_KEYS = 65_536
MAX_TENSORS = 1_000_000
MAX_NAME_BYTES = 65_535
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 2**20
DEFAULT_ALIGNMENT = 32
_MAX_NESTING = 4
_MAX_ELEMENTS = 2**56
_READ_BYTES = 2**20

# Types of metadata by number: name, and how `struct` reads it; strings and arrays have no fixed size.
_SCALARS: dict[int, tuple[str, struct.Struct]] = {
    0: ("u8", struct.Struct("<B")),
    1: ("i8", struct.Struct("<b")),
    2: ("u16", struct.Struct("<H")),
    3: ("i16", struct.Struct("<h")),
    4: ("u32", struct.Struct("<I")),
    5: ("i32", struct.Struct("<i")),
    6: ("f32", struct.Struct("<f")),
    7: ("bool", struct.Struct("<B")),
    10: ("u64", struct.Struct("<Q")),
    11: ("i64", struct.Struct("<q")),
    12: ("f64", struct.Struct("<d")),
}
_STRING, _ARRAY = 8, 9
# The least that an element of such a type takes.
_LEAST_BYTES = {_STRING: 8, _ARRAY: 12}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_NUMBERS = frozenset(("u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64", "f32", "f64", "bool"))


@dataclass(frozen=True, slots=True)
class Array:
    """An array of the metadata, as it lies in the file. kind: `u8` … `f64`, `bool`, `string` or `array`; data: its
    elements' bytes."""

    kind: str
    length: int
    data: bytes

    def numbers(self) -> list[int | float]:
        """Raises `ValueError` where it holds none."""
        if self.kind not in _NUMBERS:
            raise ValueError(f"an array of {self.kind}")
        letter = next(form.format[-1] for name, form in _SCALARS.values() if name == self.kind)
        return list(struct.unpack(f"<{self.length}{letter}", self.data))

    def strings(self) -> list[str]:
        """What is not UTF-8 shows as U+FFFD: some files hold tokens that were cut within a character.

        Raises `ValueError` where it holds none.
        """
        if self.kind != "string":
            raise ValueError(f"an array of {self.kind}")
        data, read = self.data, _U64.unpack_from
        found: list[str] = []
        at = 0
        for _ in range(self.length):
            begin = at + 8
            at = begin + read(data, at)[0]
            found.append(data[begin:at].decode("utf-8", "replace"))
        return found


Value = int | float | bool | str | Array


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a file says before its data. tensors: in the order of their data, under the file's own names and types;
    data_start: offset of the data from the beginning of the file."""

    file: str
    version: int
    alignment: int
    metadata: dict[str, Value]
    tensors: tuple[TensorHeader, ...]
    data_start: int


def read_header(descriptor: int, file: str) -> GgufHeader:
    """The header of an open file, checked against the file's size before anything of that size is read or counted.

    file: its name, for errors. Raises `CheckpointError`, which names the file and the field; `OSError`.
    """
    return _Reader(descriptor, os.fstat(descriptor).st_size, file).header()


class _Reader:
    """A cursor over the head of a file, of which no more is read than is asked for."""

    def __init__(self, descriptor: int, file_bytes: int, file: str) -> None:
        self._descriptor = descriptor
        self._file_bytes = file_bytes
        self._limit = min(file_bytes, MAX_HEADER_BYTES)
        self._file = file
        self._data = b""
        self._at = 0

    def header(self) -> GgufHeader:
        version = self._version()
        num_tensors = self._count("the number of tensors", most=MAX_TENSORS, least_bytes=8 + 4 + 4 + 8)
        num_keys = self._count("the number of metadata entries", most=MAX_KEYS, least_bytes=8 + 4 + 1)
        metadata: dict[str, Value] = {}
        for index in range(num_keys):
            key = self._name(f"the key of metadata entry {index}")
            if key in metadata:
                raise self._damaged(f"the key {_brief(key)} comes twice")
            metadata[key] = self._value(key)
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        is_size = type(alignment) is int and 0 < alignment <= MAX_ALIGNMENT and not alignment & (alignment - 1)
        if not is_size:
            raise self._damaged(f"general.alignment {_brief(alignment)} is no power of two up to {MAX_ALIGNMENT}")
        assert isinstance(alignment, int)
        described = self._tensors(num_tensors)
        data_start = -(-self._at // alignment) * alignment
        return GgufHeader(
            self._file, version, alignment, metadata, self._placed(described, data_start, alignment), data_start
        )

    def _version(self) -> int:
        if self._file_bytes < 24 or self._take(4, "the magic") != MAGIC:
            raise CheckpointError(f"{self._file} is not a GGUF file, which begins with `GGUF`", file=self._file)
        version = self._whole(_U32, "the version")
        if version and not version & 0xFFFF:
            raise CheckpointError(f"{self._file}: big-endian GGUF files are not read", file=self._file)
        if version not in VERSIONS:
            known = " and ".join(map(str, VERSIONS))
            raise CheckpointError(
                f"{self._file}: GGUF version {version} is not read, only {known} are", file=self._file
            )
        return version

    # ---------------------------------------------------------------- metadata

    def _value(self, key: str) -> Value:
        field = f"metadata {_brief(key)}"
        kind = self._whole(_U32, f"the type of {field}")
        if kind in _SCALARS:
            name, form = _SCALARS[kind]
            value: int | float = self._fixed(form, field)
            if name != "bool":
                return value
            if value not in (0, 1):
                raise self._damaged(f"{field}: the flag is {value}")
            return bool(value)
        if kind == _STRING:
            length = self._count(f"the length of {field}", most=MAX_HEADER_BYTES, least_bytes=1)
            return self._take(length, field).decode("utf-8", "replace")
        if kind == _ARRAY:
            return self._array(field, 1)
        raise self._damaged(f"{field} has the unknown type {kind}")

    def _array(self, field: str, depth: int) -> Array:
        kind = self._whole(_U32, f"the element type of {field}")
        if kind in _SCALARS:
            name, form = _SCALARS[kind]
            length = self._count(f"the length of {field}", most=MAX_HEADER_BYTES, least_bytes=form.size)
            return Array(name, length, self._take(length * form.size, field))
        if kind not in _LEAST_BYTES:
            raise self._damaged(f"{field} is an array of the unknown type {kind}")
        length = self._count(f"the length of {field}", most=MAX_HEADER_BYTES, least_bytes=_LEAST_BYTES[kind])
        begin = self._at
        if kind == _STRING:
            self._skip_strings(length, field)
        elif depth >= _MAX_NESTING:
            raise self._damaged(f"{field} is nested more than {_MAX_NESTING} deep")
        else:
            for _ in range(length):
                self._array(field, depth + 1)
        return Array("string" if kind == _STRING else "array", length, self._data[begin : self._at])

    def _skip_strings(self, length: int, field: str) -> None:
        """The loop that a vocabulary runs through: what is read is looked at in place."""
        read, limit = _U64.unpack_from, self._limit
        at, data = self._at, self._data
        end = len(data)
        for _ in range(length):
            if at + 8 > end:
                data = self._filled(at + 8, field)
                end = len(data)
            at += 8 + read(data, at)[0]
            if at > limit:
                raise self._cut(field, at)
        self._filled(at, field)
        self._at = at

    # ---------------------------------------------------------------- tensors

    def _tensors(self, count: int) -> list[tuple[str, str, tuple[int, ...], int, int, int]]:
        """(name, type, shape, number of elements, bytes, offset within the data) of each, each name once."""
        seen: set[str] = set()
        found = []
        for index in range(count):
            name = self._name(f"the name of tensor {index}")
            if name in seen:
                raise self._damaged("a tensor is described twice", name)
            seen.add(name)
            num_dimensions = self._whole(_U32, f"the dimensions of {_brief(name)}")
            if num_dimensions > MAX_DIMENSIONS:
                raise self._damaged(f"a shape of {num_dimensions} dimensions, and at most {MAX_DIMENSIONS} exist", name)
            sizes = [self._whole(_U64, f"the shape of {_brief(name)}") for _ in range(num_dimensions)]
            shape = tuple(reversed(sizes))
            if 0 in sizes or math.prod(sizes) > _MAX_ELEMENTS:
                raise self._damaged(f"the shape {list(shape)} is none that a tensor can have", name)
            number = self._whole(_U32, f"the type of {_brief(name)}")
            kind = TYPE_OF_NUMBER.get(number)
            if kind is None:
                what = REFUSED_TYPES.get(number)
                why = f"type {what} is not supported for weights" if what else f"the type number {number} is unknown"
                raise CheckpointError(f"{self._file}: {why}", file=self._file, tensors=[name])
            if (sizes[0] if sizes else 1) % kind.block_elements:
                raise self._damaged(f"rows of {sizes[0] if sizes else 1} are no blocks of {kind.name}", name)
            num_elements = math.prod(sizes)
            offset = self._whole(_U64, f"the offset of {_brief(name)}")
            num_bytes = num_elements // kind.block_elements * kind.block_bytes
            found.append((name, kind.name, shape, num_elements, num_bytes, offset))
        return found

    def _placed(
        self, described: list[tuple[str, str, tuple[int, ...], int, int, int]], data_start: int, alignment: int
    ) -> tuple[TensorHeader, ...]:
        """Each where the one before it ends, padded: as every writer places them, and llama.cpp demands it."""
        placed = []
        expected = 0
        for name, kind, shape, num_elements, num_bytes, offset in described:
            if offset % alignment:
                raise self._damaged(
                    f"the offset {offset} of a tensor is no multiple of the alignment {alignment}", name
                )
            if offset != expected:
                how = "overlaps the one before it" if offset < expected else "leaves a gap before it"
                raise self._damaged(f"the data of a tensor begins at byte {offset} and {how}: {expected} is due", name)
            if data_start + offset + num_bytes > self._file_bytes:
                missing = data_start + offset + num_bytes - self._file_bytes
                raise CheckpointError(
                    f"{self._file} is truncated: it ends {missing} bytes before the end of a tensor",
                    file=self._file,
                    tensors=[name],
                )
            placed.append(TensorHeader(name, kind, shape, data_start + offset, num_bytes, num_elements))
            expected = -(-(offset + num_bytes) // alignment) * alignment
        return tuple(placed)

    # ---------------------------------------------------------------- bytes

    def _name(self, field: str) -> str:
        length = self._count(f"the length of {field}", most=MAX_NAME_BYTES, least_bytes=1)
        try:
            return self._take(length, field).decode("utf-8")
        except UnicodeDecodeError:
            raise self._damaged(f"{field} is not UTF-8") from None

    def _count(self, field: str, *, most: int, least_bytes: int) -> int:
        """A number of things that follow, each of at least so many bytes."""
        count = self._whole(_U64, field)
        if count > most:
            raise self._damaged(f"{field} is {count}, and at most {most} are read")
        if self._at + count * least_bytes > self._limit:
            raise self._cut(f"{field} is {count}, which", self._at + count * least_bytes)
        return count

    def _fixed(self, form: struct.Struct, field: str) -> int | float:
        data = self._filled(self._at + form.size, field)
        (value,) = form.unpack_from(data, self._at)
        self._at += form.size
        found: int | float = value
        return found

    def _whole(self, form: struct.Struct, field: str) -> int:
        value = self._fixed(form, field)
        assert isinstance(value, int)
        return value

    def _take(self, num_bytes: int, field: str) -> bytes:
        data = self._filled(self._at + num_bytes, field)
        begin, self._at = self._at, self._at + num_bytes
        return data[begin : self._at]

    def _filled(self, end: int, field: str) -> bytes:
        """What has been read, at least up to `end`."""
        if end <= len(self._data):
            return self._data
        if end > self._limit:
            raise self._cut(field, end)
        wanted = min(max(end, 2 * len(self._data), _READ_BYTES), self._limit)
        parts = [self._data]
        done = len(self._data)
        while done < wanted:
            part = os.pread(self._descriptor, wanted - done, done)
            if not part:
                raise CheckpointError(
                    f"{self._file} is truncated: it became shorter while it was read", file=self._file
                )
            parts.append(part)
            done += len(part)
        self._data = b"".join(parts)
        return self._data

    def _cut(self, field: str, end: int) -> CheckpointError:
        if end > self._file_bytes:
            return self._damaged(f"{field} would end at byte {end} of a file of {self._file_bytes}")
        return self._damaged(f"{field} would end at byte {end}, and headers of at most {MAX_HEADER_BYTES} are read")

    def _damaged(self, what: str, *tensors: str) -> CheckpointError:
        return CheckpointError(f"{self._file} is damaged: {what}", file=self._file, tensors=tensors)


def _brief(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"

"""Safetensors headers, read as strictly as the format's own library reads them, or more so.

A file is 8 bytes of little-endian header length, a JSON header {name: {dtype, shape, data_offsets}} and the data, which
the tensors cover without a gap or an overlap. What is accepted here is accepted there and means the same; besides,
nothing may be said twice, and nothing but the three fields is said of a tensor.
(https://github.com/huggingface/safetensors, `SafeTensors::read_metadata` and `Metadata::validate`.)
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, NoReturn

import msgspec

from neuron.checkpoint.errors import CheckpointError

MAX_HEADER_BYTES = 32 * 2**20
"""Of one file. The longest of published checkpoints take about an eighth of it for 100,000 tensors."""
MAX_DIMENSIONS = 16
_MAX_NUMBER = 2**63 - 1

BITS: Mapping[str, int] = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "I16": 16,
    "U16": 16,
    "I32": 32,
    "U32": 32,
    "I64": 64,
    "U64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F16": 16,
    "BF16": 16,
    "F32": 32,
    "F64": 64,
    "C64": 64,
}
"""Bits of an element, by the format's names of dtypes."""

CONVERTED = frozenset(("F64", "F32", "F16", "BF16"))
"""Dtypes of weights that become the model's when they are loaded; all others are held as they are stored."""

_FIELDS = frozenset(("dtype", "shape", "data_offsets"))
_METADATA = "__metadata__"


class TensorHeader(msgspec.Struct, frozen=True):
    """One tensor. offset: of its first byte from the beginning of the file; num_bytes: of its data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int
    num_elements: int


def read_header(descriptor: int, file: str) -> list[TensorHeader]:
    """The tensors of an open file in the order of their data, checked against the file's size.

    file: its name, for errors. Raises `CheckpointError`, `OSError`.
    """
    file_bytes = os.fstat(descriptor).st_size
    prefix = os.pread(descriptor, 8, 0)
    if len(prefix) < 8:
        raise CheckpointError(f"{file} is damaged: a file of {file_bytes} bytes has no header", file=file)
    header_bytes = int.from_bytes(prefix, "little")
    if not 2 <= header_bytes <= file_bytes - 8:
        raise CheckpointError(
            f"{file} is damaged: a header of {header_bytes} bytes in a file of {file_bytes}", file=file
        )
    if header_bytes > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{file} is damaged: a header of {header_bytes} bytes, and at most {MAX_HEADER_BYTES} are read", file=file
        )
    text = _pread_fully(descriptor, header_bytes, 8, file)
    return parse_header(text, data_bytes=file_bytes - 8 - header_bytes, file=file)


def parse_header(text: bytes, *, data_bytes: int, file: str) -> list[TensorHeader]:
    """The tensors of a header in the order of their data; data_bytes: the bytes that follow it in the file.

    Raises `CheckpointError`, which names the file, the tensor and what is wrong.
    """
    tensors = [_tensor(name, entry, len(text) + 8, file) for name, entry in _entries(text, file)]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.num_bytes))
    _check_extent(tensors, len(text) + 8, data_bytes, file)
    return tensors


# ---------------------------------------------------------------- the JSON


class _Object(list[tuple[str, Any]]):
    """An object's members in order, those that come twice included."""


class _Wrong(ValueError):
    """What JSON allows and a header may not hold."""


def _entries(text: bytes, file: str) -> list[tuple[str, Any]]:
    """Names and descriptions of the tensors, each name once."""
    try:
        header = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_Object,
            parse_int=_natural,
            parse_float=_no_number,
            parse_constant=_no_number,
        )
    except RecursionError as exc:
        raise _not_a_header(file, "it is nested too deeply") from exc
    except (ValueError, MemoryError) as exc:
        raise _not_a_header(file, str(exc) or "it takes too much memory") from exc
    if not isinstance(header, _Object):
        raise _not_a_header(file, "it is not a JSON object")
    seen: set[str] = set()
    for name, entry in header:
        if name in seen:
            raise CheckpointError(f"{file} is damaged: its header holds a name twice", file=file, tensors=[name])
        seen.add(name)
        if not _is_text(name):
            raise _not_a_header(file, f"the name {ascii(name)[:200]} is not valid text")
        if name == _METADATA:
            _check_metadata(entry, file)
    return [(name, entry) for name, entry in header if name != _METADATA]


def _check_metadata(entry: Any, file: str) -> None:
    is_text = isinstance(entry, _Object) and all(
        isinstance(value, str) and _is_text(key) and _is_text(value) for key, value in entry
    )
    if not is_text:
        raise _not_a_header(file, f"{_METADATA} is not an object of strings")
    if len({key for key, _ in entry}) != len(entry):
        raise _not_a_header(file, f"{_METADATA} holds a name twice")


def _natural(digits: str) -> int:
    if digits.startswith("-"):
        raise _Wrong(f"the number {digits[:40]} is negative")
    if len(digits) > 19 or int(digits) > _MAX_NUMBER:
        raise _Wrong(f"the number {digits[:40]} is too large")
    return int(digits)


def _no_number(literal: str) -> NoReturn:
    raise _Wrong(f"{literal[:40]} is not an integer")


def _is_text(value: str) -> bool:
    """JSON can spell halves of surrogate pairs, UTF-8 cannot."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


# ---------------------------------------------------------------- one tensor


def _tensor(name: str, entry: Any, data_start: int, file: str) -> TensorHeader:
    def wrong(what: str) -> CheckpointError:
        return CheckpointError(f"{file} is damaged: {what}", file=file, tensors=[name])

    if not isinstance(entry, _Object):
        raise wrong("the description of a tensor is not an object")
    fields = dict(entry)
    if len(fields) != len(entry):
        raise wrong("a tensor is described twice")
    if fields.keys() != _FIELDS:
        raise wrong(f"a tensor is described by {', '.join(sorted(map(_brief, fields))) or 'nothing'}")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise wrong(f"dtype {_brief(dtype)} is unknown")
    if not _are_naturals(shape):
        raise wrong(f"shape {_brief(shape)} is not a list of whole numbers")
    if len(shape) > MAX_DIMENSIONS:
        raise wrong(f"a shape of {len(shape)} dimensions, and at most {MAX_DIMENSIONS} are known")
    if not (_are_naturals(offsets) and len(offsets) == 2):
        raise wrong(f"data_offsets {_brief(offsets)} are not two whole numbers")
    begin, end = offsets
    if end < begin:
        raise wrong(f"data_offsets {_brief(offsets)} end before they begin")
    num_elements = 1
    for size in shape:
        num_elements *= size
        if num_elements > _MAX_NUMBER // 64:
            raise wrong(f"shape {_brief(shape)} has more elements than can be counted")
    num_bits = num_elements * BITS[dtype]
    if num_bits != (end - begin) * 8:
        raise wrong(
            f"size and shape disagree: {dtype} of shape {_brief(shape)} takes {num_bits / 8:g} bytes, "
            f"and data_offsets {_brief(offsets)} are {end - begin}"
        )
    return TensorHeader(name, dtype, tuple(shape), data_start + begin, end - begin, num_elements)


def _are_naturals(value: Any) -> bool:
    # Negative numbers and fractions have been refused by then; bool is an int to Python only.
    return type(value) is list and all(type(item) is int for item in value)


def _check_extent(tensors: list[TensorHeader], data_start: int, data_bytes: int, file: str) -> None:
    """The tensors must cover the data from its beginning to its end, each byte once."""
    at = data_start
    for tensor in tensors:
        if tensor.offset != at:
            how = "overlaps the one before it" if tensor.offset < at else "leaves a gap before it"
            raise CheckpointError(
                f"{file} is damaged: the data of a tensor begins at byte {tensor.offset - data_start} and {how}, which "
                f"ends at {at - data_start}",
                file=file,
                tensors=[tensor.name],
            )
        at += tensor.num_bytes
    missing = at - data_start - data_bytes
    if missing > 0:
        beyond = [tensor.name for tensor in tensors if tensor.offset + tensor.num_bytes > data_start + data_bytes]
        raise CheckpointError(
            f"{file} is truncated: {data_bytes} bytes of data, and its header describes {at - data_start}; it is cut "
            f"short by {missing} bytes",
            file=file,
            tensors=beyond,
        )
    if missing < 0:
        raise CheckpointError(f"{file} is damaged: {-missing} bytes of data at its end belong to no tensor", file=file)


def _not_a_header(file: str, why: str) -> CheckpointError:
    return CheckpointError(f"{file} is damaged: its header is not a safetensors header ({why[:300]})", file=file)


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value if type(value) is not list else value[:20])
    return text if len(text) <= 100 else f"{text[:100]}…"


def _pread_fully(descriptor: int, num_bytes: int, offset: int, file: str) -> bytes:
    parts, done = [], 0
    while done < num_bytes:
        part = os.pread(descriptor, num_bytes - done, offset + done)
        if not part:
            raise CheckpointError(f"{file} is truncated: it became shorter while it was read", file=file)
        parts.append(part)
        done += len(part)
    return b"".join(parts)

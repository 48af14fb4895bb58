"""Headers of safetensors files that lie."""

from __future__ import annotations

import json
from typing import Any


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def packed(header: object, num_bytes: int = 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(num_bytes)


LIES: dict[str, tuple[bytes, str]] = {
    "float offset": (packed({"t": entry(offsets=[0, 8.0])}), "8.0 is not an integer"),
    "float in exponent form": (packed(b'{"t":{"dtype":"F32","shape":[2],"data_offsets":[0,8e0]}}'), "8e0 is not"),
    "bool offset": (packed({"t": entry(offsets=[False, 8])}), "not two whole numbers: t"),
    "negative offset": (packed({"t": entry(offsets=[-8, 0])}), "-8 is negative"),
    "negative zero": (packed(b'{"t":{"dtype":"F32","shape":[0],"data_offsets":[-0,0]}}'), "-0 is negative"),
    "null offset": (packed({"t": entry(offsets=[None, 8])}), "not two whole numbers: t"),
    "text offset": (packed({"t": entry(offsets=["0", "8"])}), "not two whole numbers: t"),
    "one offset": (packed({"t": entry(offsets=[8])}), "not two whole numbers: t"),
    "three offsets": (packed({"t": entry(offsets=[0, 8, 8])}), "not two whole numbers: t"),
    "offsets are an object": (packed({"t": entry(offsets={"0": 8})}), "not two whole numbers: t"),
    "end before begin": (packed({"t": entry(offsets=[8, 0])}), "end before they begin: t"),
    "overlap": (packed({"a": entry(), "t": entry(offsets=[4, 12])}, 12), "overlaps the one before it.*: t"),
    "gap": (packed({"a": entry(), "t": entry(offsets=[12, 20])}, 20), "leaves a gap before it.*: t"),
    "gap at the beginning": (packed({"t": entry(offsets=[4, 12])}, 12), "leaves a gap before it.*: t"),
    "beyond the file": (packed({"a": entry(), "t": entry(offsets=[8, 16])}, 12), "cut short by 4 bytes: t"),
    "far beyond the file": (packed({"t": entry(shape=[2**40], offsets=[0, 2**42])}), "cut short by .*: t"),
    "data of nobody": (packed({"t": entry()}, 9), "1 bytes of data at its end belong to no tensor"),
    "dtype unknown": (packed({"t": entry("F33")}), "dtype F33 is unknown: t"),
    "dtype a number": (packed({"t": entry(32)}), "dtype 32 is unknown: t"),
    "dtype an object": (packed({"t": entry({})}), "dtype .* is unknown: t"),
    "dtype absent": (packed({"t": {"shape": [2], "data_offsets": [0, 8]}}), "described by data_offsets, shape: t"),
    "more is said": (packed({"t": entry(strides=[1])}), "described by .*strides: t"),
    "shape negative": (packed({"t": entry(shape=[-2])}), "-2 is negative"),
    "shape of two negatives": (packed({"t": entry(shape=[-1, -2])}), "-1 is negative"),
    "shape a float": (packed({"t": entry(shape=[2.0])}), "2.0 is not an integer"),
    "shape a bool": (packed({"t": entry(shape=[True, 2])}), "shape .* is not a list of whole numbers: t"),
    "shape a number": (packed({"t": entry(shape=2)}), "shape 2 is not a list of whole numbers: t"),
    "shape null": (packed({"t": entry(shape=None)}), "shape None is not a list of whole numbers: t"),
    "shape and bytes disagree": (packed({"t": entry(shape=[3])}), "size and shape disagree.*: t"),
    "shape and bytes disagree for integers": (packed({"t": entry("I8", [3])}), "size and shape disagree.*: t"),
    "product overflows": (packed({"t": entry(shape=[2**32, 2**33], offsets=[0, 0])}), "more elements than.*: t"),
    "product overflows before a zero": (packed({"t": entry(shape=[2**62, 2**62, 0], offsets=[0, 0])}), "more el.*: t"),
    "number beyond 64 bits": (packed({"t": entry(shape=[0, 2**64], offsets=[0, 0])}), "is too large"),
    "number of 5,000 digits": (packed(b'{"t":{"shape":[' + b"9" * 5_000 + b"]}}"), "is too large"),
    "many dimensions": (packed({"t": entry(shape=[1] * 10_000 + [2])}), "a shape of 10001 dimensions.*: t"),
    "part of a byte": (packed({"t": entry("F4", [3], [0, 1])}, 1), "size and shape disagree.*: t"),
    "NaN": (packed(b'{"t":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}'), "NaN is not an integer"),
    "infinity": (packed(b'{"t":{"dtype":"F32","shape":[-Infinity],"data_offsets":[0,8]}}'), "-Infinity is not"),
    "tensor a list": (packed({"t": [1, 2]}), "not an object: t"),
    "tensor a number": (packed({"t": 3}), "not an object: t"),
    "tensor null": (packed({"t": None}), "not an object: t"),
    "name twice": (packed(b'{"t":%(e)b,"t":%(e)b}' % {b"e": json.dumps(entry()).encode()}), "holds a name twice: t"),
    "name twice, once escaped": (
        packed(b'{"t":%(e)b,"\\u0074":%(e)b}' % {b"e": json.dumps(entry()).encode()}),
        "holds a name twice: t",
    ),
    "field twice": (packed(b'{"t":{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}}'), "twice: t"),
    "name half a character": (packed(b'{"\\ud800":' + json.dumps(entry()).encode() + b"}"), "is not valid text"),
    "names not text": (packed(b"{3: {}}"), "not a safetensors header"),
    "metadata a list": (packed({"__metadata__": [], "t": entry()}), "__metadata__ is not an object of strings"),
    "metadata null": (packed({"__metadata__": None, "t": entry()}), "__metadata__ is not an object of strings"),
    "metadata of numbers": (packed({"__metadata__": {"a": 3}, "t": entry()}), "__metadata__ is not an object of str"),
    "metadata nested": (packed({"__metadata__": {"a": {"b": "c"}}}, 0), "__metadata__ is not an object of strings"),
    "metadata twice": (packed(b'{"__metadata__":{},"__metadata__":{}}', 0), "holds a name twice: __metadata__"),
    "header a list": (packed([1, 2]), "not a JSON object"),
    "header text": (packed(b'"abc"'), "not a JSON object"),
    "header null": (packed(b"null"), "not a JSON object"),
    "header of spaces": (packed(b" " * 100), "not a safetensors header"),
    "header cut short": (packed(b'{"t":{"dtype":"F32"'), "not a safetensors header"),
    "something behind the header": (packed(b"{} {}", 0), "not a safetensors header"),
    "zeros behind the header": (packed(b"{}\0\0", 0), "not a safetensors header"),
    "a byte order mark": (packed(b"\xef\xbb\xbf{}", 0), "not a safetensors header"),
    "not UTF-8": (packed(b'{"\xff\xfe":3}'), "not a safetensors header"),
    "nested 100,000 deep": (packed(b'{"a":' * 100_000), "nested too deeply"),
    "lists nested 100,000 deep": (packed(b"[" * 100_000), "nested too deeply"),
    "length of 2^63": ((2**63).to_bytes(8, "little") + b"{}", f"a header of {2**63} bytes in a file of 10"),
    "length of 2^64 - 1": (b"\xff" * 8 + b"{}", f"a header of {2**64 - 1} bytes"),
    "length of 0": (bytes(8), "a header of 0 bytes"),
    "length of 1": (packed(b"{"), "a header of 1 bytes"),
    "length one too many": ((3).to_bytes(8, "little") + b"{}", "a header of 3 bytes in a file of 10"),
    "empty file": (b"", "a file of 0 bytes has no header"),
    "seven bytes": (bytes(7), "a file of 7 bytes has no header"),
}

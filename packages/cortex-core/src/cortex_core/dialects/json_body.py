"""Request bodies: JSON decoding and typed field access whose errors name the field as a path.

Every failure is an `ApiError` of kind `invalid_request` with `param` set to a path such as
`messages[0].content[1].type`; nothing else is raised, whatever the bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, TypeVar, overload

import msgspec

from cortex_core.errors import ApiError, invalid

MAX_DEPTH = 128
"""Containers within containers. Deeper values would exhaust the stack of template engines and schema compilers."""

_decode = msgspec.json.Decoder().decode


class _Named(msgspec.Struct):
    model: Any = None


_named_decoder = msgspec.json.Decoder(_Named)
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_SHOWN_CHARACTERS = 64

MAX_MODEL_NAME = 512
"""Names end up in caches, log lines and messages; a client must not choose how large those get."""

Default = TypeVar("Default")
T = TypeVar("T")


def decode_object(body: bytes) -> Fields:
    """The body as a JSON object. A repeated key takes its last value, as in the SDKs' own decoders.

    Refused: invalid UTF-8, malformed JSON (NaN and Infinity, numbers beyond a double, lone surrogates, trailing
    characters), anything but an object at the top, and nesting deeper than `MAX_DEPTH`.
    """
    try:
        value = _decode(body)
    except UnicodeDecodeError as error:
        raise invalid(f"The request body is not valid UTF-8: {error}", code="invalid_json") from error
    except RecursionError as error:
        raise _too_deep() from error
    except msgspec.DecodeError as error:
        hint = " (it holds a lone surrogate escape)" if _SURROGATE_ESCAPE.search(body) else ""
        raise invalid(f"The request body is not valid JSON: {error}{hint}", code="invalid_json") from error
    if type(value) is not dict:
        raise invalid(f"The request body must be a JSON object, not {describe_type(value)}", code="invalid_type")
    _check_depth(value)
    return Fields(value)


def model_name(body: bytes) -> str:
    """The `model` of a body, all else of which is passed over unread. Raises `ApiError` as `decode_object` does."""
    try:
        name = _named_decoder.decode(body).model
    except UnicodeDecodeError as error:
        raise invalid(f"The request body is not valid UTF-8: {error}", code="invalid_json") from error
    except RecursionError as error:
        raise _too_deep() from error
    except msgspec.ValidationError as error:
        raise _not_an_object(body) from error
    except msgspec.DecodeError as error:
        raise invalid(f"The request body is not valid JSON: {error}", code="invalid_json") from error
    return Fields({"model": name}).model_name()


def _not_an_object(body: bytes) -> ApiError:
    first = body.lstrip()[:1]
    kinds = {b"[": "an array", b'"': "a string", b"n": "null", b"t": "a boolean", b"f": "a boolean"}
    kind = kinds.get(first, "a number")
    return invalid(f"The request body must be a JSON object, not {kind}", code="invalid_type")


def _check_depth(value: dict[str, Any]) -> None:
    level: list[Any] = [value]
    depth = 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise _too_deep()
        deeper: list[Any] = []
        for container in level:
            children = container.values() if type(container) is dict else container
            deeper += [child for child in children if type(child) is dict or type(child) is list]
        level = deeper


def _too_deep() -> ApiError:
    return invalid(f"The request body is nested deeper than {MAX_DEPTH} levels", code="invalid_json")


def decode_struct(body: bytes, type_: type[T]) -> T:
    """A body of the control plane as its type; `3.0` is an integer there, too.

    Raises `msgspec.DecodeError` (of which `ValidationError` is one), `UnicodeDecodeError` and `RecursionError`.
    """
    return msgspec.convert(_with_whole_numbers(_decode(body)), type_)


def _with_whole_numbers(value: Any) -> Any:
    if type(value) is float and value.is_integer():
        return int(value)
    if type(value) is list:
        return [_with_whole_numbers(item) for item in value]
    if type(value) is dict:
        return {key: _with_whole_numbers(item) for key, item in value.items()}
    return value


def encode_compact(value: Any) -> str:
    """JSON text of decoded JSON. Integers of any size survive, which msgspec's encoder would refuse."""
    return json.dumps(value, ensure_ascii=False)


def describe_type(value: object) -> str:
    """`value`'s JSON type with its article."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int):
        return "an integer"
    if isinstance(value, float):
        return "a number"
    if isinstance(value, str):
        return "a string"
    if isinstance(value, list):
        return "an array"
    return "an object"


def show(value: object) -> str:
    """A client's value for an error message, cut short."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"


def wrong_type(path: str, expected: str, value: object) -> ApiError:
    return invalid(f"{path}: expected {expected}, got {describe_type(value)}", param=path, code="invalid_type")


def missing(path: str) -> ApiError:
    return invalid(f"{path}: field required", param=path, code="missing_required_parameter")


def unsupported(path: str, why: str) -> ApiError:
    """A field or value of the official API that this server cannot honour, refused by name."""
    return invalid(f"{path}: {why}", param=path, code="unsupported_parameter")


def one_of(path: str, value: object, allowed: tuple[str, ...]) -> ApiError:
    listed = ", ".join(repr(name) for name in allowed)
    return invalid(f"{path}: must be one of {listed}, got {show(value)}", param=path)


class Fields:
    """A JSON object and where it stands in the body. Readers treat null like an absent field."""

    __slots__ = ("path", "values")

    def __init__(self, values: dict[str, Any], path: str = "") -> None:
        self.values = values
        self.path = path

    @classmethod
    def of(cls, value: Any, path: str) -> Fields:
        """`value` as an object at `path`; raises where it is something else."""
        if type(value) is not dict:
            raise wrong_type(path, "an object", value)
        return cls(value, path)

    def at(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name

    def get(self, name: str) -> Any:
        return self.values.get(name)

    def has(self, name: str) -> bool:
        """Present and not null."""
        return self.values.get(name) is not None

    @overload
    def string(self, name: str) -> str | None: ...
    @overload
    def string(self, name: str, default: Default) -> str | Default: ...
    def string(self, name: str, default: Any = None) -> Any:
        value = self.values.get(name)
        if value is None:
            return default
        if type(value) is not str:
            raise wrong_type(self.at(name), "a string", value)
        return value

    def required_string(self, name: str, *, may_be_empty: bool = False) -> str:
        value = self.string(name)
        if value is None:
            raise missing(self.at(name))
        if not value and not may_be_empty:
            raise invalid(f"{self.at(name)}: must not be empty", param=self.at(name))
        return value

    def model_name(self) -> str:
        name = self.required_string("model")
        if len(name) > MAX_MODEL_NAME:
            raise invalid(f"model: no name is longer than {MAX_MODEL_NAME} characters", param="model")
        return name

    def choice(self, name: str, allowed: tuple[str, ...]) -> str | None:
        value = self.string(name)
        if value is not None and value not in allowed:
            raise one_of(self.at(name), value, allowed)
        return value

    def boolean(self, name: str, default: bool = False) -> bool:
        value = self.optional_boolean(name)
        return default if value is None else value

    def optional_boolean(self, name: str) -> bool | None:
        value = self.values.get(name)
        if value is None or type(value) is bool:
            return value
        raise wrong_type(self.at(name), "a boolean", value)

    def integer(self, name: str, minimum: int, maximum: int | None = None) -> int | None:
        """An integer within [minimum, maximum]; `3.0` is one, as languages without integers send it so."""
        value = self.values.get(name)
        if value is None:
            return None
        if type(value) is float and value.is_integer():
            value = int(value)
        if type(value) is not int:
            raise wrong_type(self.at(name), "an integer", value)
        self._check_range(name, value, minimum, maximum)
        return value

    def number(self, name: str, minimum: float, maximum: float, *, minimum_is_excluded: bool = False) -> float | None:
        value = self.values.get(name)
        if value is None:
            return None
        if type(value) is not float and type(value) is not int:
            raise wrong_type(self.at(name), "a number", value)
        if minimum_is_excluded and value <= minimum:
            raise invalid(f"{self.at(name)}: must be greater than {minimum:g}, got {show(value)}", param=self.at(name))
        self._check_range(name, value, minimum, maximum)
        return float(value)

    def _check_range(self, name: str, value: float, minimum: float, maximum: float | None) -> None:
        if value < minimum:
            raise invalid(f"{self.at(name)}: must be at least {minimum}, got {show(value)}", param=self.at(name))
        if maximum is not None and value > maximum:
            raise invalid(f"{self.at(name)}: must be at most {maximum}, got {show(value)}", param=self.at(name))

    def object(self, name: str) -> Fields | None:
        value = self.values.get(name)
        return None if value is None else Fields.of(value, self.at(name))

    def required_object(self, name: str) -> Fields:
        value = self.object(name)
        if value is None:
            raise missing(self.at(name))
        return value

    def array(self, name: str) -> list[Any] | None:
        value = self.values.get(name)
        if value is not None and type(value) is not list:
            raise wrong_type(self.at(name), "an array", value)
        return value

    def objects(self, name: str) -> Iterator[Fields]:
        """The objects of an array, none where the field is absent."""
        for index, value in enumerate(self.array(name) or ()):
            yield Fields.of(value, f"{self.at(name)}[{index}]")

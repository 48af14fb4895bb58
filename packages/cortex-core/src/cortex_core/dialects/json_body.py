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

from cortex_core.dialects import limits
from cortex_core.errors import ApiError, invalid

_decode = msgspec.json.Decoder().decode


class _Named(msgspec.Struct):
    model: msgspec.Raw = msgspec.Raw(b"null")


_named_decoder = msgspec.json.Decoder(_Named)
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_STRINGS = re.compile(rb'(?:[^"]*+"(?:[^"\\]++|\\.)*+"?){0,4096}+', re.DOTALL)
_BYTES_OF_CHARACTER = 12
"""At most, of one character in JSON: two escapes."""
_SHOWN_CHARACTERS = 64

Default = TypeVar("Default")
T = TypeVar("T")


def decode_object(body: bytes) -> Fields:
    """The body as a JSON object. A repeated key takes its last value, as in the SDKs' own decoders.

    Refused: invalid UTF-8, malformed JSON (NaN and Infinity, numbers beyond a double, lone surrogates, trailing
    characters), anything but an object at the top, nesting deeper than `limits.MAX_DEPTH`, and, before anything is made
    of them, more containers or values than `limits` says.
    """
    _check_count(body)
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
        given = bytes(_named_decoder.decode(body).model)
    except UnicodeDecodeError as error:
        raise invalid(f"The request body is not valid UTF-8: {error}", code="invalid_json") from error
    except RecursionError as error:
        raise _too_deep() from error
    except msgspec.ValidationError as error:
        raise _not_an_object(body) from error
    except msgspec.DecodeError as error:
        raise invalid(f"The request body is not valid JSON: {error}", code="invalid_json") from error
    if len(given) > limits.MAX_MODEL_NAME * _BYTES_OF_CHARACTER + 2:  # too long for a name, and for a look at it
        raise (
            _name_too_long()
            if given.startswith(b'"')
            else invalid(f"model: expected a string, got {_kind(given)}", param="model", code="invalid_type")
        )
    return Fields({"model": _decode(given)}).model_name()


def _not_an_object(body: bytes) -> ApiError:
    return invalid(f"The request body must be a JSON object, not {_kind(body.lstrip())}", code="invalid_type")


def _kind(encoded: bytes) -> str:
    kinds = {b"[": "an array", b"{": "an object", b'"': "a string", b"n": "null", b"t": "a boolean", b"f": "a boolean"}
    return kinds.get(encoded[:1], "a number")


def _name_too_long() -> ApiError:
    return invalid(f"model: no name is longer than {limits.MAX_MODEL_NAME} characters", param="model")


def _check_count(body: bytes) -> None:
    """Counts marks, at first those in strings too: that is quick, and nearly always enough."""
    if len(body) < 2 * limits.MAX_CONTAINERS:
        return
    num_containers, num_values = _counted(body)
    if num_containers <= limits.MAX_CONTAINERS and num_values <= limits.MAX_VALUES:
        return
    num_containers = num_values = at = 0
    while at < len(body):
        strings = _STRINGS.match(body, at)
        end = len(body) if strings is None or strings.end() == at else strings.end()
        containers, values = _counted(_STRING.sub(b"", body[at:end]))
        num_containers, num_values, at = num_containers + containers, num_values + values, end
        if num_containers > limits.MAX_CONTAINERS:
            raise _too_many("objects and arrays", limits.MAX_CONTAINERS)
        if num_values > limits.MAX_VALUES:
            raise _too_many("values", limits.MAX_VALUES)


def _counted(structure: bytes) -> tuple[int, int]:
    """Containers, and values."""
    num_containers = structure.count(b"{") + structure.count(b"[")
    return num_containers, num_containers + structure.count(b",")


def _too_many(what: str, limit: int) -> ApiError:
    return invalid(f"The request body holds more {what} than {limit}", code="invalid_json")


def _check_depth(value: dict[str, Any]) -> None:
    level: list[Any] = [value]
    depth = 0
    while level:
        depth += 1
        if depth > limits.MAX_DEPTH:
            raise _too_deep()
        deeper: list[Any] = []
        for container in level:
            children = container.values() if type(container) is dict else container
            deeper += [child for child in children if type(child) is dict or type(child) is list]
        level = deeper


def _too_deep() -> ApiError:
    return invalid(f"The request body is nested deeper than {limits.MAX_DEPTH} levels", code="invalid_json")


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
    text = repr(value[:_SHOWN_CHARACTERS] if isinstance(value, str | list) else value)
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
        if len(name) > limits.MAX_MODEL_NAME:
            raise _name_too_long()
        return name

    def name(self, name: str) -> str | None:
        """The name of a tool or of what belongs to one."""
        value = self.string(name)
        if value is not None and len(value) > limits.MAX_NAME:
            path = self.at(name)
            raise invalid(f"{path}: at most {limits.MAX_NAME} characters, got {len(value)}", param=path)
        return value

    def required_name(self, name: str) -> str:
        self.name(name)
        return self.required_string(name)

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

    def number(self, name: str, minimum: float, maximum: float) -> float | None:
        value = self.values.get(name)
        if value is None:
            return None
        if type(value) is not float and type(value) is not int:
            raise wrong_type(self.at(name), "a number", value)
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

    def array(self, name: str, at_most: int | None = None) -> list[Any] | None:
        """at_most: how many entries it may have."""
        value = self.values.get(name)
        if value is None:
            return None
        if type(value) is not list:
            raise wrong_type(self.at(name), "an array", value)
        if at_most is not None and len(value) > at_most:
            path = self.at(name)
            raise invalid(f"{path}: at most {at_most} entries, got {len(value)}", param=path)
        return value

    def objects(self, name: str, at_most: int | None = None) -> Iterator[Fields]:
        """The objects of an array, none where the field is absent."""
        for index, value in enumerate(self.array(name, at_most) or ()):
            yield Fields.of(value, f"{self.at(name)}[{index}]")

    def check_parts(self, name: str, *holders: str) -> None:
        """Count what the messages in `name` are made of: entries of their arrays `holders`, and of those in these."""
        count = 0
        for message in self.array(name) or ():
            for part in _listed(message, holders):
                count += 1 + len(_listed(part, ("content",)))
        if count > limits.MAX_PARTS:
            path = self.at(name)
            raise invalid(f"{path}: at most {limits.MAX_PARTS} parts in all, got {count}", param=path)


def _listed(value: Any, holders: tuple[str, ...]) -> list[Any]:
    if type(value) is not dict:
        return []
    return [entry for holder in holders if type(value.get(holder)) is list for entry in value[holder]]

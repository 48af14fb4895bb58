"""Configuration: a TOML file, then environment overrides, into a frozen struct.

Every error names the file, the line and the key. Unknown keys are errors too: a misspelt key that is swallowed
is a setting that silently does not apply.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import stat
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import msgspec

T = TypeVar("T")

MAX_CONFIG_BYTES = 16 * 2**20
"""Of a configuration file, the catalogue and the keys of a file among them."""


class ConfigError(Exception):
    """A configuration that cannot be used. `str()` is one line per fault: `file:line: message (key)`."""

    def __init__(self, faults: Iterable[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(self.faults))


def load_config(
    type_: type[T],
    path: Path | str | None,
    *,
    env_prefix: str = "",
    environ: Mapping[str, str] | None = None,
    required: bool = True,
) -> T:
    """Read `path` into `type_`, then apply environment overrides.

    `CORTEX_GATEWAY__LISTEN=…` (prefix `CORTEX_`, nesting `__`) sets `gateway.listen`; list elements are addressed
    by index (`CORTEX_NEURONS__0__ENDPOINT`). Values that are not plain strings or numbers are written as TOML
    values. Single-level names that are no key are ignored: other variables share the prefix.

    Raises `ConfigError`. With `required=False` a missing file means "all defaults".
    """
    text = read_text(path, required=required) if path is not None else ""
    name = str(path) if path is not None else "<environment>"
    return parse_config(
        type_, text, name=name, env_prefix=env_prefix, environ=os.environ if environ is None else environ
    )


def read_text(path: Path | str, *, required: bool = True) -> str:
    """A configuration file as it is. Raises `ConfigError`; with `required=False` a missing file is an empty one."""
    try:
        text = read_regular(path, limit=MAX_CONFIG_BYTES).decode("utf-8")
        return text.replace("\r\n", "\n").replace("\r", "\n")
    except FileNotFoundError:
        if required:
            raise ConfigError([f"{path}: no such file"]) from None
        return ""
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError([f"{path}: cannot be read: {exc}"]) from exc


def read_regular(path: Path | str, *, limit: int) -> bytes:
    """A whole file, without waiting. limit: in bytes.

    Files are read again while a server runs: a FIFO in the place of one would hold its reader for ever, and with it
    every later reload, or the event loop; a device answers without end. Raises `OSError`, with `EINVAL` for what is no
    regular file and `EFBIG` for what is longer.
    """
    _refuse_irregular(path, Path(path).stat())  # first of all: the mere opening of some devices does something
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    with os.fdopen(descriptor, "rb") as file:
        _refuse_irregular(path, os.fstat(descriptor))
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it is longer than {limit} bytes", str(path))
    return content


def _refuse_irregular(path: Path | str, status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))


def parse_config(
    type_: type[T], text: str, *, name: str, env_prefix: str = "", environ: Mapping[str, str] | None = None
) -> T:
    """`load_config` on text already read."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        match = re.search(r"\(at line (\d+), column (\d+)\)", str(exc))
        where = f"{name}:{match[1]}:{match[2]}" if match else name
        raise ConfigError([f"{where}: not valid TOML: {str(exc).split(' (at ')[0]}"]) from exc
    lines = _key_lines(text)
    faults = [
        f"{_where(name, lines, key_path)}: unknown key `{_dotted(key_path)}`{_nearest(key_path, known)}"
        for key_path, known in _unknown_keys(data, type_, ())
    ]
    if faults:
        raise ConfigError(faults)
    origins = _apply_environment(data, type_, env_prefix, environ) if env_prefix and environ else {}
    try:
        return msgspec.convert(data, type_, strict=True)
    except msgspec.ValidationError as exc:
        message, _, raw_path = str(exc).partition(" - at `")
        key_path = _parse_fault_path(raw_path.rstrip("`"))
        missing = re.match(r"Object missing required field `(.+)`", message)
        if missing:
            dotted = _dotted((*key_path, missing[1]))
            raise ConfigError([f"{_where(name, lines, key_path)}: missing key `{dotted}`"]) from exc
        where = origins.get(_dotted(key_path)) or _where(name, lines, key_path)
        raise ConfigError([f"{where}: {message} (`{_dotted(key_path)}`)"]) from exc


# ------------------------------------------------------------------------------------------- environment


def _apply_environment(data: dict[str, Any], type_: Any, prefix: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Write overrides into `data`; returns dotted key -> variable name, for error messages."""
    origins: dict[str, str] = {}
    faults: list[str] = []
    for variable in sorted(environ):
        if not variable.startswith(prefix):
            continue
        segments = [segment.lower() for segment in variable[len(prefix) :].split("__")]
        leaf = _type_at(type_, segments)
        if leaf is None:
            if len(segments) > 1:
                faults.append(f"{variable}: unknown key `{'.'.join(segments)}`")
            continue
        try:
            value = _coerce(environ[variable], leaf)
            _assign(data, segments, value)
        except (ValueError, msgspec.ValidationError) as exc:
            faults.append(f"{variable}: {exc}")
            continue
        origins[_dotted(tuple(int(s) if s.isdigit() else s for s in segments))] = variable
    if faults:
        raise ConfigError(faults)
    return origins


def _coerce(text: str, leaf: Any) -> Any:
    is_list = text.startswith("[") and _accepts(leaf, _is_list)
    if _accepts(leaf, _is_text) and not is_list:
        return msgspec.to_builtins(msgspec.convert(text, leaf, strict=False))
    try:
        if not is_list:
            return msgspec.to_builtins(msgspec.convert(text, leaf, strict=False))
    except msgspec.ValidationError:
        pass
    try:
        parsed = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        # Not the text itself: it may hold a key or a password.
        raise ValueError("not a value of the expected type") from None
    return msgspec.to_builtins(msgspec.convert(parsed, leaf, strict=False))


def _accepts(leaf: Any, is_kind: Callable[[Any], bool]) -> bool:
    if get_origin(leaf) in (Union, types.UnionType, typing.Annotated):
        return any(_accepts(arg, is_kind) for arg in get_args(leaf))
    return is_kind(leaf)


def _is_text(leaf: Any) -> bool:
    return leaf is str


def _is_list(leaf: Any) -> bool:
    return get_origin(leaf) in (list, tuple)


def _assign(data: dict[str, Any], segments: list[str], value: Any) -> None:
    target: Any = data
    for position, segment in enumerate(segments):
        last = position == len(segments) - 1
        if isinstance(target, list):
            index = int(segment)
            if index > len(target):
                raise ValueError(f"list index {index} leaves a gap (the list has {len(target)} elements)")
            if index == len(target):
                target.append({})
            if last:
                target[index] = value
            else:
                target = target[index]
        elif last:
            target[segment] = value
        else:
            empty: Any = [] if segments[position + 1].isdigit() else {}
            target = target.setdefault(segment, empty)


# ------------------------------------------------------------------------------------------- types


def _strip_optional(type_: Any) -> Any:
    if get_origin(type_) in (Union, types.UnionType):
        members = [arg for arg in get_args(type_) if arg is not type(None)]
        structs = [arg for arg in members if isinstance(arg, type) and issubclass(arg, msgspec.Struct)]
        if len(structs) == 1:
            return structs[0]
        if len(members) == 1:
            return _strip_optional(members[0])
    if get_origin(type_) is typing.Annotated:
        return _strip_optional(get_args(type_)[0])
    return type_


def _fields(type_: Any) -> dict[str, Any] | None:
    """TOML key -> type, or None if `type_` is no struct."""
    type_ = _strip_optional(type_)
    if isinstance(type_, type) and issubclass(type_, msgspec.Struct):
        hints = typing.get_type_hints(type_, include_extras=True)
        return {
            encoded: hints[field]
            for field, encoded in zip(type_.__struct_fields__, type_.__struct_encode_fields__, strict=True)
        }
    return None


def _element(type_: Any) -> Any | None:
    type_ = _strip_optional(type_)
    origin, args = get_origin(type_), get_args(type_)
    if origin in (list, tuple, set, frozenset) and args:
        return args[0]
    return None


def _mapping_value(type_: Any) -> Any | None:
    type_ = _strip_optional(type_)
    if get_origin(type_) is dict:
        return get_args(type_)[1]
    return None


def _type_at(type_: Any, segments: list[str]) -> Any | None:
    for segment in segments:
        fields = _fields(type_)
        if fields is not None:
            if segment not in fields:
                return None
            type_ = fields[segment]
        elif segment.isdigit() and _element(type_) is not None:
            type_ = _element(type_)
        elif _mapping_value(type_) is not None:
            type_ = _mapping_value(type_)
        else:
            return None
    return type_


KeyPath = tuple[str | int, ...]


def _unknown_keys(data: Any, type_: Any, at: KeyPath) -> Iterable[tuple[KeyPath, list[str]]]:
    fields = _fields(type_)
    if fields is not None and isinstance(data, dict):
        for key, value in data.items():
            if key in fields:
                yield from _unknown_keys(value, fields[key], (*at, key))
            else:
                yield (*at, key), list(fields)
        return
    element, value_type = _element(type_), _mapping_value(type_)
    if element is not None and isinstance(data, list):
        for index, value in enumerate(data):
            yield from _unknown_keys(value, element, (*at, index))
    elif value_type is not None and isinstance(data, dict):
        for key, value in data.items():
            yield from _unknown_keys(value, value_type, (*at, key))


def _nearest(key_path: KeyPath, known: list[str]) -> str:
    close = difflib.get_close_matches(str(key_path[-1]), known, n=1)
    return f" (did you mean `{close[0]}`?)" if close else f" (known keys: {', '.join(sorted(known))})"


# ------------------------------------------------------------------------------------------- places


def _dotted(key_path: KeyPath) -> str:
    text = ""
    for part in key_path:
        text += f"[{part}]" if isinstance(part, int) else (f".{part}" if text else part)
    return text


def _parse_fault_path(path: str) -> KeyPath:
    """msgspec writes `$.neurons[1].endpoint`; `[...]` (some key of a mapping) ends what can be located."""
    parts: list[str | int] = []
    for match in re.finditer(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]", path):
        if match[2] == "...":
            break
        parts.append(match[1] if match[1] is not None else int(match[2]))
    return tuple(parts)


def _where(name: str, lines: dict[KeyPath, int], key_path: KeyPath) -> str:
    while key_path:
        if key_path in lines:
            return f"{name}:{lines[key_path]}"
        key_path = key_path[:-1]
    return name


_KEY = r"(?:[A-Za-z0-9_-]+|\"[^\"]*\"|'[^']*')"
_HEADER = re.compile(rf"^\s*(\[\[?)\s*({_KEY}(?:\s*\.\s*{_KEY})*)\s*\]\]?\s*(?:#.*)?$")
_ASSIGNMENT = re.compile(rf"^\s*({_KEY}(?:\s*\.\s*{_KEY})*)\s*=")
_PART = re.compile(_KEY)


def _key_lines(text: str) -> dict[KeyPath, int]:
    """Line (from 1) of each key and table header that stands on a line of its own."""
    lines: dict[KeyPath, int] = {}
    counts: dict[KeyPath, int] = {}
    table: KeyPath = ()
    closing: str | None = None
    for number, line in enumerate(text.splitlines(), start=1):
        if closing is not None:
            if closing in line:
                closing = None
            continue
        header = _HEADER.match(line)
        if header:
            parts = tuple(part.strip("\"'") for part in _PART.findall(header[2]))
            table = _resolve(parts[:-1], counts)
            if header[1] == "[[":
                index = counts.get((*table, parts[-1]), -1) + 1
                counts[(*table, parts[-1])] = index
                lines.setdefault((*table, parts[-1]), number)
                table = (*table, parts[-1], index)
            else:
                table = (*table, parts[-1])
            lines.setdefault(table, number)
            continue
        assignment = _ASSIGNMENT.match(line)
        if assignment:
            parts = tuple(part.strip("\"'") for part in _PART.findall(assignment[1]))
            for end in range(1, len(parts) + 1):
                lines.setdefault((*table, *parts[:end]), number)
            rest = line[assignment.end() :]
            for quote in ('"""', "'''"):
                if rest.count(quote) == 1:
                    closing = quote
    return lines


def _resolve(parts: tuple[str, ...], counts: dict[KeyPath, int]) -> KeyPath:
    """A table path with the current element index after each array of tables."""
    resolved: KeyPath = ()
    for part in parts:
        resolved = (*resolved, part)
        if resolved in counts:
            resolved = (*resolved, counts[resolved])
    return resolved

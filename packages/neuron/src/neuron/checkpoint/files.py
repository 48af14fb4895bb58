"""Bounded reads of a checkpoint's files: regular files only, never blocking, no longer than their kind may be.

A checkpoint is data of a stranger. A FIFO in the place of a file would hold its reader for ever, a device would answer
without end, a link might lead to what was never meant to be shown, and a file may be of any length or change while it
is read. Everything of a checkpoint is therefore opened here, on either side of the border; a test keeps other opens
out.

Links are what the Hugging Face cache is made of, so they are followed: within the folder, to a blob of such a cache,
and to a file of the same name elsewhere (weights: to any `.safetensors` file), as people link shards on other disks.
"""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from neuron.checkpoint.errors import CheckpointError, NotJson

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MIB = 2**20

INDEX_FILE = "model.safetensors.index.json"
SAFETENSORS = ".safetensors"

MAX_BYTES = {
    "config.json": 4 * _MIB,
    "generation_config.json": 4 * _MIB,
    "tokenizer.json": 64 * _MIB,
    "tokenizer.model": 64 * _MIB,
    "tokenizer_config.json": 16 * _MIB,
    "special_tokens_map.json": 4 * _MIB,
    "added_tokens.json": 16 * _MIB,
    "chat_template.json": 4 * _MIB,
    INDEX_FILE: 64 * _MIB,
}
"""The longest file of each kind that is read, in bytes: several times the longest that published checkpoints have."""
MAX_OTHER_BYTES = 4 * _MIB
"""The longest file of any other name: templates, and the cache's own notes."""
MAX_ENTRIES = 20_000
"""Files and folders that a checkpoint folder may hold, those that lie deeper included."""
_MAX_DEPTH = 3
_READ_BYTES = _MIB

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
    (stat.S_ISSOCK, "a socket"),
)


def max_bytes(name: str) -> int:
    """The longest file of this name that is read, in bytes."""
    return MAX_BYTES.get(name, MAX_OTHER_BYTES)


def open_file(path: Path) -> int:
    """A descriptor of a regular file, for reading. The caller closes it.

    Raises `CheckpointError` for anything else than a regular file and for a link that leads astray; `OSError`.
    """
    _refuse_irregular(path, path.stat())  # first of all: the mere opening of some devices does something
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        status = os.fstat(descriptor)
        _refuse_irregular(path, status)
        _refuse_stray_link(path, status)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_file(path: Path, *, limit: int | None = None) -> bytes:
    """The whole file; limit: in bytes, that of its name if not given.

    Raises `CheckpointError`: not a regular file, a link that leads astray, too long; `OSError`.
    """
    limit = max_bytes(path.name) if limit is None else limit
    descriptor = open_file(path)
    try:
        size = os.fstat(descriptor).st_size
        if size > limit:
            raise _too_long(path, size, limit)
        content = bytearray()
        while data := os.read(descriptor, min(_READ_BYTES, limit + 1 - len(content))):
            content += data
            if len(content) > limit:  # it grows, or does not say how long it is
                raise _too_long(path, len(content), limit)
        return bytes(content)
    finally:
        os.close(descriptor)


def read_text(path: Path, *, limit: int | None = None) -> str:
    """The whole file as UTF-8. Raises as `read_file` does, and `CheckpointError` for what is no UTF-8."""
    try:
        return read_file(path, limit=limit).decode("utf-8")
    except UnicodeDecodeError as exc:
        raise CheckpointError(f"{path.name} is not UTF-8: byte {exc.start}", file=path.name) from exc


def read_json(path: Path, *, type: type[T] | Any = Any, limit: int | None = None) -> T | Any:
    """The whole file, decoded as `type`. Raises as `read_file` does, and `NotJson` for what is no such JSON."""
    data = read_file(path, limit=limit)
    try:
        return msgspec.json.decode(data, type=type)
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        why = "it begins with a byte order mark" if data.startswith(b"\xef\xbb\xbf") else str(exc)
        raise NotJson(f"{path.name} is not valid JSON: {why}", file=path.name) from exc
    except RecursionError as exc:
        raise NotJson(f"{path.name} is not valid JSON: it is nested too deeply", file=path.name) from exc


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object of a file that a checkpoint can do without: empty where it is not there, or holds anything else,
    which is logged. Raises as `read_file` does."""
    try:
        value = read_json(path)
    except FileNotFoundError:
        return {}
    except NotJson as exc:
        logger.warning("%s is ignored: %s", path, exc)
        return {}
    return value if isinstance(value, dict) else {}


def list_files(folder: Path) -> list[str]:
    """Names of the files of a folder and of those below it, relative to it, as far as they matter.

    At the top everything counts that bears a file's name, whatever it is: who reads it says what is wrong with it. A
    link that leads nowhere is no file. Left out are folders whose names begin with a dot, that lie deeper than anything
    a checkpoint has, or that may not be looked into, and names that nobody could write down. Raises `CheckpointError`
    for more than `MAX_ENTRIES` entries; `OSError`.
    """
    names: list[str] = []
    num_seen = 0
    pending: list[tuple[str, int]] = [("", 0)]
    while pending:
        inside, depth = pending.pop()
        try:
            entries = os.scandir(folder / inside)
        except OSError:
            if inside:
                continue
            raise
        with entries:
            for entry in entries:
                num_seen += 1
                if num_seen > MAX_ENTRIES:
                    raise CheckpointError(f"{folder} holds more than {MAX_ENTRIES} files, and no checkpoint does")
                name = f"{inside}{entry.name}"
                if entry.is_dir(follow_symlinks=False) and not _is_named_as_a_file(entry.name):
                    if depth < _MAX_DEPTH and not entry.name.startswith("."):
                        pending.append((f"{name}/", depth + 1))
                elif name.isprintable() and not _leads_nowhere(entry):
                    names.append(name)
    return names


def _is_named_as_a_file(name: str) -> bool:
    return name in MAX_BYTES or name.endswith((SAFETENSORS, ".jinja"))


def _leads_nowhere(entry: os.DirEntry[str]) -> bool:
    try:
        entry.stat()
    except FileNotFoundError:
        return True
    except OSError:  # a circle of links, or a place that may not be looked at: its reader says so
        return False
    return False


def _refuse_irregular(path: Path, status: os.stat_result) -> None:
    if stat.S_ISREG(status.st_mode):
        return
    kind = next((name for test, name in _KINDS if test(status.st_mode)), "no file")
    raise CheckpointError(f"{path.name} is {kind}, and only regular files are read", file=path.name)


def _refuse_stray_link(path: Path, status: os.stat_result) -> None:
    folder = os.path.realpath(path.parent)
    real = os.path.realpath(path)
    if real != os.path.join(folder, path.name):  # noqa: PTH118
        if not os.path.samestat(Path(real).stat(), status):
            raise CheckpointError(f"{path.name} was replaced while it was opened", file=path.name)
        if _leads_astray(path.name, Path(real), Path(folder)):
            raise CheckpointError(
                f"{path.name} is a link that leads out of the checkpoint, to {real}; a link may lead to a file of the "
                "same name, or into a Hugging Face cache",
                file=path.name,
            )


def _leads_astray(name: str, real: Path, folder: Path) -> bool:
    if real.is_relative_to(folder):
        return False
    if real.parent.name == "blobs" and (real.parent.parent / "snapshots").is_dir():
        return False
    return real.name != name and not (name.endswith(SAFETENSORS) and real.name.endswith(SAFETENSORS))


def _too_long(path: Path, size: int, limit: int) -> CheckpointError:
    return CheckpointError(
        f"{path.name} is too long: {size} bytes, and at most {limit} of such a file are read", file=path.name
    )

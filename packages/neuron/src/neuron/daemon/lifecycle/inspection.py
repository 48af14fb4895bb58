"""Inspection of a checkpoint's files in a process that may be killed for it.

A checkpoint is data of a stranger, and the daemon answers for every model of its host. So nobody here reads a
checkpoint folder in the daemon: a short-lived process lists it, decodes its config, index and headers, holds them
against each other, and answers with the few figures that a load needs, or with the refusal. It has a deadline, a limit
of memory and none of the daemon's descriptors; a disk that hangs, a file that decodes into gigabytes or a bug in a
parser costs this one load.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
from cortex_core.errors import ApiError
from cortex_core.fleet import ModelSpec

from neuron.checkpoint.config import ModelConfig, read_config
from neuron.checkpoint.families import family_of
from neuron.checkpoint.files import list_files, read_json
from neuron.checkpoint.layout import StoredTensor, stored, summarised
from neuron.checkpoint.preflight import check_config, check_layout, refusal, refusing
from neuron.checkpoint.tensor_shapes import check_shapes
from neuron.checkpoint.weight_files import headers_of, merge, read_index, select
from neuron.daemon.hub.download import FetchCancelled
from neuron.daemon.lifecycle.fingerprint import checkpoint_digest
from neuron.daemon.supervisor.process_group import child_environ
from neuron.daemon.text_workers.limits import end_with_parent

DEADLINE_S = 60.0
"""The longest that reading a checkpoint's small files and headers may take."""
MAX_MEMORY_BYTES = 3 * 2**30
"""Address space of the process. A checkpoint of 100,000 tensors takes a fifth of it."""
MAX_AT_ONCE = 4
_POLL_S = 0.25
_REAP_S = 5.0
_MAX_ERROR_BYTES = 2_000

_places = threading.BoundedSemaphore(MAX_AT_ONCE)


class Inspection(msgspec.Struct, frozen=True):
    """A checkpoint that has passed. tensors: its tensors summed up by what an estimate tells apart; weight_files: names
    of the files to be read; weight_bytes: of them together. digest: see `lifecycle.fingerprint`."""

    model: ModelConfig
    tensors: tuple[StoredTensor, ...]
    weight_files: tuple[str, ...]
    weight_bytes: int
    digest: str = ""


def inspect(spec: ModelSpec, path: Path) -> Inspection:
    """Read all of a checkpoint but its text files and its weights. Raises `ApiError` 422, which names what is wrong."""
    if not path.is_dir():
        raise refusal("repo_fetch_failed", f"`{path}` is not a folder.", model_id=spec.model_id, cause="no such folder")
    with refusing(spec, path):
        names = list_files(path)
        check_layout(spec, names)
        config = read_json(path / "config.json")
        check_config(spec, config)
        family = family_of(config)
        model = read_config(config, family)
        weight_map = read_index(path)
        files = select(names, weight_map)
        found = merge(headers_of(path, files), weight_map)
        tensors = [tensor for _, tensor in found.values()]
        check_shapes(model, family.tensor_names, tensors)
        weight_bytes = sum((path / name).stat().st_size for name in files)
        digest = checkpoint_digest(path, names, files)
    return Inspection(model, tuple(summarised(map(stored, tensors), model)), files, weight_bytes, digest)


# ---------------------------------------------------------------- the process


class _Order(msgspec.Struct, frozen=True):
    """parent: the daemon's process id; the process ends with it."""

    parent: int
    spec: ModelSpec
    path: str
    cpu_s: int
    memory_bytes: int


class _Reply(msgspec.Struct, frozen=True):
    """One of the two: a refusal is code, message and facts of the error."""

    inspection: Inspection | None = None
    refused: tuple[str, str, dict[str, Any]] | None = None


def inspect_in_process(
    spec: ModelSpec,
    path: Path,
    *,
    cancelled: threading.Event,
    deadline_s: float = DEADLINE_S,
    memory_bytes: int = MAX_MEMORY_BYTES,
    command: Sequence[str] = (sys.executable, "-P", "-m", "neuron.daemon.lifecycle.inspection"),
) -> Inspection:
    """`inspect`, in a process of its own. Blocks, for deadline_s at most once it has a place.

    Raises `ApiError`: 422, also where the process takes too long or too much memory, and a retryable 503 where other
    checkpoints are being read for so long that there is no place; `FetchCancelled`.
    """
    with _Place(spec, cancelled, deadline_s):
        order = _Order(os.getpid(), spec, str(path), int(deadline_s) + 1, memory_bytes)
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=child_environ(os.environ),
        )
        try:
            output, errors = _communicate(process, msgspec.json.encode(order), spec, cancelled, deadline_s)
        finally:
            _end(process)
    try:
        reply = msgspec.json.decode(output, type=_Reply)
    except msgspec.MsgspecError:
        reply = _Reply()
    if reply.inspection is not None:
        return reply.inspection
    if reply.refused is not None:
        code, message, facts = reply.refused
        raise refusal(code, message, **{key: value for key, value in facts.items() if key != "kind"})
    raise _failed(spec, process.returncode, errors, memory_bytes)


class _Place:
    """One of the few places for such processes."""

    def __init__(self, spec: ModelSpec, cancelled: threading.Event, patience_s: float) -> None:
        self._spec = spec
        self._cancelled = cancelled
        self._patience_s = patience_s

    def __enter__(self) -> None:
        until = time.monotonic() + self._patience_s
        while not _places.acquire(timeout=_POLL_S):
            if self._cancelled.is_set():
                raise FetchCancelled
            if time.monotonic() >= until:
                raise ApiError(
                    "overloaded",
                    f"`{self._spec.model_id}` was not looked at: {MAX_AT_ONCE} other checkpoints are being read, and "
                    f"none was done within {self._patience_s:.0f} s.",
                    code="checkpoints_busy",
                    retry_after=30,
                )

    def __exit__(self, *_: object) -> None:
        _places.release()


def _communicate(
    process: subprocess.Popen[bytes], order: bytes, spec: ModelSpec, cancelled: threading.Event, deadline_s: float
) -> tuple[bytes, bytes]:
    until = time.monotonic() + deadline_s
    unsent: bytes | None = order
    while True:
        try:
            return process.communicate(unsent, timeout=_POLL_S)
        except subprocess.TimeoutExpired:
            unsent = None
            if cancelled.is_set():
                raise FetchCancelled from None
            if time.monotonic() >= until:
                raise _too_much(spec, f"more than {deadline_s:.0f} s") from None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Whatever it does; one that a dead disk holds is left to the kernel."""
    process.kill()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_REAP_S)


def _failed(spec: ModelSpec, code: int | None, errors: bytes, memory_bytes: int) -> ApiError:
    said = errors[-_MAX_ERROR_BYTES:].decode("utf-8", "replace").strip().splitlines()
    last = said[-1] if said else "no word"
    if last.startswith("MemoryError") or code == -signal.SIGKILL:
        return _too_much(spec, f"more than {memory_bytes // 2**20} MiB of memory")
    if code == -signal.SIGXCPU:
        return _too_much(spec, "too much time")
    return refusal(
        "bad_checkpoint",
        f"`{spec.model_id}`: its files could not be looked through: the process that did ended with {code} ({last}).",
        model_id=spec.model_id,
    )


def _too_much(spec: ModelSpec, how_much: str) -> ApiError:
    return refusal(
        "bad_checkpoint",
        f"`{spec.model_id}`: looking through its config, index and headers took {how_much}, and was given up.",
        model_id=spec.model_id,
    )


def main(
    read: Callable[[], bytes] = lambda: sys.stdin.buffer.read(),
    write: Callable[[bytes], object] = lambda data: os.write(sys.stdout.fileno(), data),
) -> None:
    """The process: one order from standard input, one reply to standard output."""
    order = msgspec.json.decode(read(), type=_Order)
    end_with_parent(order.parent)
    resource.setrlimit(resource.RLIMIT_AS, (order.memory_bytes, order.memory_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (order.cpu_s, order.cpu_s + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        reply = _Reply(inspection=inspect(order.spec, Path(order.path)))
    except ApiError as exc:
        reply = _Reply(refused=(exc.code or "bad_checkpoint", exc.message, dict(exc.extras)))
    write(msgspec.json.encode(reply))


if __name__ == "__main__":
    main()

"""State file of what this neuron serves: a daemon that died loads it again when it is back.

One small JSON file, replaced as a whole (written beside it, fsync, rename, fsync of the folder), so that a power cut
leaves the old list or the new one. A model is on it from the end of its load until it is unloaded on request; how the
daemon ends makes no difference. Models that the configuration lists are not: the configuration says so already.

A model whose load takes the daemon down with it would do so for ever: before each load at start the attempt is put on
disk, and taken back as soon as the load has ended, however it did. After `MAX_STARTS` in a row that nobody lived to
take back, the next one waits, longer each time (`pause_s`): for a while the daemon serves what else there is. An end
that finds the model loaded is no fault of its load and counts for nothing.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
from cortex_core.config import MAX_CONFIG_BYTES, read_regular
from cortex_core.errors import ApiError
from cortex_core.fleet import ModelSpec

from neuron.daemon.common.daemon_thread import run_in_daemon_thread

logger = logging.getLogger(__name__)

VERSION = 1
MAX_STARTS = 3
FIRST_PAUSE_S = 60.0
LONGEST_PAUSE_S = 1800.0


class _Document(msgspec.Struct, frozen=True):
    """The file. models: served, in the order they were loaded. starts: loads at start that were not seen to end."""

    version: int = VERSION
    models: tuple[ModelSpec, ...] = ()
    starts: dict[str, int] = {}


class ServedModels:
    """The list, in memory and in the file at `path` (None keeps none). All of it on the event loop.

    id_of: the id that a spec is served under. configured: ids that the configuration loads.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        id_of: Callable[[str], str],
        configured: Iterable[str] = (),
    ) -> None:
        self._path = path
        self._id_of = id_of
        self._configured = frozenset(configured)
        self._lock: int | None = None
        self._models: dict[str, ModelSpec] = {}
        self._starts: dict[str, int] = {}
        self._writing: asyncio.Task[None] | None = None
        self._is_dirty = False

    def open(self) -> tuple[ModelSpec, ...]:
        """Take the file and read it: what was served and is not configured, in order. Blocks for a moment.

        What cannot be read is put aside and logged, never an error; a file that another daemon holds is left alone.
        """
        if self._path is None:
            return ()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self._path.with_suffix(".lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            logger.warning("what is served is not remembered: %s: %s", self._path, exc)
            self._release()
            self._path = None
            return ()
        document = read_state(self._path)
        self._starts = {model: count for model, count in document.starts.items() if count > 0}
        for spec in document.models:
            try:
                model_id = self._id_of(spec.model_id)
            except ApiError as exc:
                logger.warning("a remembered model is left out: %s", exc.message)
                continue
            if model_id not in self._configured:
                self._models[model_id] = spec
        return tuple(self._models.values())

    async def close(self) -> None:
        """The daemon ends in order: no load is to blame for it. What is served stays on the list."""
        self._starts.clear()
        self._write()
        await self.flushed()
        self._release()
        self._path = None

    # ------------------------------------------------------------------ what happens

    def add(self, model_id: str, spec: ModelSpec) -> None:
        """The model is loaded."""
        if model_id not in self._configured:
            self._models[model_id] = spec
        self._survived(model_id)

    def remove(self, model_id: str) -> None:
        """The model was unloaded on request."""
        self._models.pop(model_id, None)
        self._survived(model_id)

    def pause_s(self, spec: ModelSpec) -> float:
        """Seconds that the daemon is to serve before it loads this one at start: longer with each lost life."""
        return pause_after(self._starts_of(spec))

    def fault(self, spec: ModelSpec) -> str:
        """Why there is a pause."""
        return f"The neuron ended {self._starts_of(spec)} times in a row while it loaded `{spec.model_id}`."

    async def load(self, spec: ModelSpec, load: Callable[[ModelSpec], Awaitable[None]]) -> None:
        """Load at start through `load`, on the record; nothing, where it has been unloaded meanwhile. Raises its
        `ApiError`."""
        model_id = self._id_of(spec.model_id)
        if model_id not in self._models and model_id not in self._configured:
            return
        self._starts[model_id] = self._starts.get(model_id, 0) + 1
        self._write()
        await self.flushed()
        try:
            await load(spec)
        finally:
            self._survived(model_id)  # it may have failed, but we are here to say so
        await self.flushed()

    def _starts_of(self, spec: ModelSpec) -> int:
        try:
            return self._starts.get(self._id_of(spec.model_id), 0)
        except ApiError:  # it is no id: its load will say so
            return 0

    def _survived(self, model_id: str) -> None:
        self._starts.pop(model_id, None)
        self._write()

    # ------------------------------------------------------------------ the file

    async def flushed(self) -> None:
        """Wait until all that was said before is on disk, or could not be put there."""
        while self._writing is not None:
            await asyncio.shield(self._writing)

    def _write(self) -> None:
        if self._path is None:
            return
        self._is_dirty = True
        if self._writing is None:
            self._writing = asyncio.create_task(self._write_all(self._path))

    async def _write_all(self, path: Path) -> None:
        """One write at a time, and one for all the changes that came while another ran."""
        try:
            while self._is_dirty:
                self._is_dirty = False
                document = _Document(models=tuple(self._models.values()), starts=dict(self._starts))
                try:
                    await run_in_daemon_thread(lambda d=document: write_state(path, d), name="state file")  # type: ignore[misc]
                except OSError as exc:
                    logger.error("what is served could not be written down: %s: %s", path, exc)
        finally:
            self._writing = None

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def pause_after(starts: int) -> float:
    """Seconds before the load that follows so many which the daemon did not live to see the end of."""
    if starts < MAX_STARTS:
        return 0.0
    return min(FIRST_PAUSE_S * 2.0 ** min(starts - MAX_STARTS, 16), LONGEST_PAUSE_S)


def read_state(path: Path) -> _Document:
    """The file's content; empty if there is none. One that is damaged, of a later version, or not to be read is put
    aside, where the next list does not replace it."""
    try:
        document = msgspec.json.decode(read_regular(path, limit=MAX_CONFIG_BYTES), type=_Document)
        if document.version != VERSION:
            raise ValueError(f"version {document.version}, {VERSION} is known")
    except FileNotFoundError:
        return _Document()
    except (OSError, msgspec.MsgspecError, ValueError) as exc:
        aside = path.with_suffix(".damaged")
        logger.warning("what was served cannot be read and is put aside as %s: %s", aside, exc)
        try:
            path.replace(aside)
        except OSError:
            logger.warning("%s cannot be moved", path)
        return _Document()
    return document


def write_state(path: Path, document: Any) -> None:
    """Replace the file as a whole, on disk when this returns. Raises `OSError`, and then the old one is still there."""
    new = path.with_suffix(".new")
    with new.open("wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(document), indent=2))
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

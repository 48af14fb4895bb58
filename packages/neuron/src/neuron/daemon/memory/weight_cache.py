"""Copies of checkpoints in host memory, from which a model comes back at the speed of memory.

A copy is the weight files of one folder as they are, each in an anonymous file (memfd) that belongs to this process and
is sealed once it is whole. Engines get descriptors of them when they are started and read them as they would read the
files, so a copy serves any dtype and any division among ranks, and also an engine that is rebuilt after its death.
It cannot leak: when the daemon is gone, however it went, and no engine reads any more, the kernel frees it.

All of it on the event loop, but for the copying itself and for looking at files, which are done by daemon threads.
"""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import logging
import os
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import msgspec

from neuron.checkpoint.errors import CheckpointError
from neuron.checkpoint.files import open_file
from neuron.checkpoint.folder import weight_paths
from neuron.daemon.common.daemon_thread import run_in_daemon_thread

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 16 * 2**20
# Free memory is looked at again after so many bytes of a copy.
_LOOK_BYTES = 256 * 2**20
# Of a thread that copies: whatever else runs goes first.
_NICE = 15
_WATCH_INTERVAL_S = 5.0
# Files that do not even tell their size in this time are on a disk that is better not asked.
_LOOK_TIMEOUT_S = 10.0
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL

GIVE_UP_REASONS = ("budget", "memory", "changed")

Identity = tuple[int, int, int, int]
"""Device, inode, size and time of change of a file: another of these is another file."""


class CopyState(msgspec.Struct, frozen=True):
    """What decides who is given up. last_used: a number that grows with time."""

    path: Path
    num_bytes: int
    is_loaded: bool
    last_used: int


def victims(copies: Iterable[CopyState], needed: int, *, keep: Path | None = None) -> list[CopyState]:
    """The copies to give up so that `needed` bytes become free, or all of them if they are not enough.

    First those of models that are loaded now, whose copies only speed up a recovery; then the one that was used
    longest ago. `keep`, which somebody is about to read, goes last.
    """
    chosen, freed = [], 0
    for copy in sorted(copies, key=lambda copy: (copy.path == keep, not copy.is_loaded, copy.last_used)):
        if freed >= needed:
            break
        chosen.append(copy)
        freed += copy.num_bytes
    return chosen


def default_budget_bytes(free_bytes: int, *, has_devices: bool) -> int:
    """A quarter of the memory that is free at start, where models live on devices. On a CPU that memory is the
    models' own, and what is left of it keeps files anyway: none."""
    return free_bytes // 4 if has_devices else 0


class _Copy:
    """One folder's copy. Its memory is free when `close` has been called and every engine has closed its own."""

    def __init__(self, path: Path, files: Mapping[str, tuple[int, Identity]], used: int) -> None:
        self.path = path
        self.files = dict(files)
        self.num_bytes = sum(identity[2] for _, identity in self.files.values())
        self.is_loaded = False
        self.last_used = used

    @property
    def state(self) -> CopyState:
        return CopyState(self.path, self.num_bytes, self.is_loaded, self.last_used)

    @property
    def identities(self) -> dict[str, Identity]:
        return {name: identity for name, (_, identity) in self.files.items()}

    def close(self) -> None:
        for descriptor, _ in self.files.values():
            os.close(descriptor)
        self.files.clear()


class WeightCache:
    """budget_bytes: the most that copies take; 0 keeps none. free_bytes: memory available on the host, read at once.
    headroom_bytes: less than that free, and copies are given up until it is there again.

    Counters: hits, misses (loads and rebuilds with and without a copy), given_up by reason: `budget`, `memory`,
    `changed`.
    """

    def __init__(self, budget_bytes: int, *, free_bytes: Callable[[], int], headroom_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.hits = 0
        self.misses = 0
        self.given_up: Counter[str] = Counter()
        self._free_bytes = free_bytes
        self._headroom_bytes = headroom_bytes
        self._copies: dict[Path, _Copy] = {}
        self._copying: dict[Path, asyncio.Task[None]] = {}
        self._users: defaultdict[Path, set[str]] = defaultdict(set)
        self._one_at_a_time = asyncio.Lock()
        self._clock = itertools.count()
        self._is_closed = threading.Event()

    @property
    def held_bytes(self) -> int:
        """Of all copies that are whole. May be asked from a thread, as the memory ledger does."""
        return sum(copy.num_bytes for copy in list(self._copies.values()))

    @property
    def held(self) -> list[CopyState]:
        """The copies there are, by folder."""
        return [copy.state for copy in self._copies.values()]

    # ------------------------------------------------------------------ what models do

    async def descriptors(self, path: Path) -> dict[str, int]:
        """Of a load or a rebuild that is about to start: descriptors by file name, which the caller closes; empty where
        there is no copy, or where the files are no longer those that were copied, or do not say so in time."""
        copy = self._copies.get(path)
        if copy is not None:
            found: dict[str, Identity] | None = None
            with suppress(OSError, CheckpointError, TimeoutError):
                async with asyncio.timeout(_LOOK_TIMEOUT_S):
                    found = await run_in_daemon_thread(lambda: _identities_now(path), name=f"weights of {path.name}")
            if self._copies.get(path) is not copy:
                copy = None  # given up meanwhile
            elif found != copy.identities:
                self._give_up(copy.state, "changed")
                copy = None
        if copy is None:
            self.misses += self.budget_bytes > 0
            return {}
        self.hits += 1
        copy.last_used = next(self._clock)
        return {name: os.dup(descriptor) for name, (descriptor, _) in copy.files.items()}

    def loaded(self, path: Path, model_id: str) -> None:
        """A model serves from this folder: copied if that takes no room from others."""
        self._users[path].add(model_id)
        self._mark(path)
        self._keep(path)

    def unloaded(self, path: Path, model_id: str) -> None:
        """It has left: the folder is copied now, if it is not already, in place of what was used longest ago."""
        self._users[path].discard(model_id)
        self._mark(path)
        self._keep(path)

    def _mark(self, path: Path) -> None:
        copy = self._copies.get(path)
        if copy is not None:
            copy.is_loaded = self._is_loaded(path)
            copy.last_used = next(self._clock)

    def _is_loaded(self, path: Path) -> bool:
        return bool(self._users[path])

    # ------------------------------------------------------------------ giving up

    def give_up(self, num_bytes: int, *, keep: Path | None = None) -> None:
        """Free at least so many bytes, as far as copies go; `keep` goes last."""
        for copy in victims(self.held, num_bytes, keep=keep):
            self._give_up(copy, "memory")

    async def watch(self) -> None:
        """Give up what the host is short of, until cancelled."""
        while True:
            await asyncio.sleep(_WATCH_INTERVAL_S)
            self.relieve()

    def relieve(self) -> None:
        """Give up copies if less than the headroom is free."""
        if self._copies and (missing := self._headroom_bytes - self._free_bytes()) > 0:
            self.give_up(missing)

    def close(self) -> None:
        """Give up everything, and every copy that is being made."""
        self._is_closed.set()
        for task in self._copying.values():
            task.cancel()
        for copy in self._copies.values():
            copy.close()
        self._copies.clear()

    def _give_up(self, state: CopyState, reason: str) -> None:
        copy = self._copies.pop(state.path)
        copy.close()
        self.given_up[reason] += 1
        logger.info("weights given up path=%s bytes=%d reason=%s", state.path, state.num_bytes, reason)

    # ------------------------------------------------------------------ copying

    def _keep(self, path: Path) -> None:
        if self.budget_bytes <= 0 or self._is_closed.is_set() or path in self._copying:
            return
        task = self._copying[path] = asyncio.create_task(self._copy(path), name=f"copy of {path}")
        task.add_done_callback(lambda _: self._copying.pop(path, None))

    async def settled(self) -> None:
        """Wait until nothing is being copied."""
        while self._copying:
            await asyncio.wait(list(self._copying.values()))

    async def _copy(self, path: Path) -> None:
        async with self._one_at_a_time:
            try:
                await self._copy_now(path)
            except (OSError, CheckpointError) as exc:
                logger.warning("weights not kept path=%s reason=%s", path, exc)

    async def _copy_now(self, path: Path) -> None:
        identities = await run_in_daemon_thread(lambda: _identities_now(path), name=f"weights of {path.name}")
        there = self._copies.get(path)
        if there is not None:
            if there.identities == identities:
                return
            self._give_up(there.state, "changed")
        num_bytes = sum(identity[2] for identity in identities.values())
        is_loaded = self._is_loaded(path)
        room = self.budget_bytes - self.held_bytes
        # The copy of a loaded model is worth no other's.
        if num_bytes > (room if is_loaded else self.budget_bytes):
            return
        if num_bytes > self._free_bytes() - self._headroom_bytes:
            logger.info("weights not kept path=%s bytes=%d reason=memory is short", path, num_bytes)
            return
        if num_bytes > room:
            for copy in victims(self.held, num_bytes - room):
                self._give_up(copy, "budget")
        files = await run_in_daemon_thread(lambda: self._copy_files(path, identities), name=f"copy of {path.name}")
        if files is None:
            return
        copied = _Copy(path, files, next(self._clock))
        if self._is_closed.is_set():
            copied.close()
            return
        copied.is_loaded = self._is_loaded(path)
        self._copies[path] = copied
        logger.info("weights kept path=%s bytes=%d held=%d", path, num_bytes, self.held_bytes)

    def _copy_files(self, path: Path, identities: Mapping[str, Identity]) -> dict[str, tuple[int, Identity]] | None:
        """On a thread of its own. None where it was called off, or memory became short, or a file changed."""
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        files: dict[str, tuple[int, Identity]] = {}
        try:
            for name, identity in identities.items():
                descriptor = os.memfd_create(f"weights {name}"[:200], os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
                files[name] = (descriptor, identity)
                if not self._copy_file(path / name, descriptor, identity):
                    return self._discard(files)
                fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            self._discard(files)
            raise
        return files

    def _copy_file(self, file: Path, descriptor: int, identity: Identity) -> bool:
        looked = 0
        with os.fdopen(open_file(file), "rb", buffering=0) as source:
            done = 0
            while done < identity[2]:
                if self._is_closed.is_set():
                    return False
                if done >= looked:
                    if self._free_bytes() < self._headroom_bytes:
                        logger.info("weights not kept path=%s reason=memory became short", file)
                        return False
                    looked += _LOOK_BYTES
                # In the kernel, from page to page: nothing of it passes through this process.
                sent = os.sendfile(descriptor, source.fileno(), done, min(_CHUNK_BYTES, identity[2] - done))
                if not sent:
                    return False  # it was cut short
                done += sent
            return _identity_of(os.fstat(source.fileno())) == identity

    @staticmethod
    def _discard(files: Mapping[str, tuple[int, Identity]]) -> None:
        for descriptor, _ in files.values():
            os.close(descriptor)


def _identities_now(path: Path) -> dict[str, Identity]:
    """Of the weight files of a folder, by name. Blocks. Raises `OSError`, `CheckpointError`."""
    return {file.name: _identity_of(file.stat()) for file in weight_paths(path)}


def _identity_of(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

"""One file of a registry into the Hugging Face cache: resumed where it was, checked, and whole or not there.

huggingface-hub downloads to a file with a random name and deletes it when it fails, so whatever it had fetched of a
shard is lost with the process. Here the part is `blobs/ETAG.partial`: it survives the daemon, and the next fetch goes
on from its length. A file gets its name in the cache only after its size and hash are right and its bytes are on
disk; until then no load can see it. Locks are those of the library, so its own tools and ours do not meet.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Protocol

import msgspec

from neuron.checkpoint.files import SAFETENSORS, max_bytes
from neuron.daemon.hub.bounded_answers import limit_answers

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

logger = logging.getLogger(__name__)

RESUME_FROM_BYTES = 2**20
"""Parts below this are not worth a ranged request (and such files may come compressed)."""
_LOCK_POLL_S = 0.2
_READ_BYTES = 8 * 2**20
_FULL = (errno.ENOSPC, errno.EDQUOT)
# Of the disk's free space, what weights may take whose size the registry does not say.
_SHARE_FOR_THE_UNKNOWN = 0.5


_FILE_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z_+=-]{0,127}")


class FetchCancelled(Exception):
    """The fetch was called off."""


class DamagedDownload(Exception):
    """What came is not what the registry says the file is."""


class RemoteFile(msgspec.Struct, frozen=True):
    """A file as the registry lists it. size: bytes, None if it does not say. sha256: of large files; git_sha1: of the
    others, as git hashes a blob."""

    name: str
    size: int | None = None
    sha256: str | None = None
    git_sha1: str | None = None


class Connections:
    """A context for every fetch. The library keeps connections for later: they are closed when the last fetch ends."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_fetches = 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._num_fetches:
                limit_answers()
            self._num_fetches += 1

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        import huggingface_hub

        with self._lock:
            self._num_fetches -= 1
            close = getattr(huggingface_hub, "close_session", None)  # libraries before 1.0 have none
            if not self._num_fetches and close is not None:
                close()


class _Hash(Protocol):
    def update(self, data: ReadableBuffer, /) -> None: ...
    def hexdigest(self) -> str: ...


class Downloader:
    """Files of one revision of one repository.

    storage: the repository's folder in the cache. url_of: where a file is. on_bytes: called with bytes as they come
    (a negative number where a part was thrown away), from the thread of `get`. Thread-safe.
    """

    def __init__(
        self,
        storage: Path,
        *,
        repo: str,
        revision: str,
        endpoint: str | None,
        token: str | bool | None,
        cancelled: Callable[[], bool],
        on_bytes: Callable[[int], None] = lambda num_bytes: None,
    ) -> None:
        self._storage = storage
        self._repo = repo
        self._revision = revision
        self._endpoint = endpoint
        self._token = token
        self._cancelled = cancelled
        self._on_bytes = on_bytes

    def pointer(self, name: str) -> Path:
        """Where a load finds a file of this revision."""
        return self._storage / "snapshots" / self._revision / name

    def is_here(self, file: RemoteFile) -> bool:
        """Whether the file is in the cache, with the size that it should have."""
        return _has_size(self.pointer(file.name), file.size)

    def partial_bytes(self) -> int:
        """What is on disk of files that were interrupted."""
        return sum(path.stat().st_size for path in self._blobs.glob("*.partial"))

    def get(self, file: RemoteFile) -> Path:
        """The file in the cache, fetched if it is not there.

        Raises `FetchCancelled`, `DamagedDownload`, `OSError` and what the library raises of HTTP.
        """
        self._check()
        pointer = self.pointer(file.name)
        if _has_size(pointer, file.size):
            return pointer
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url

        url = hf_hub_url(self._repo, file.name, revision=self._revision, endpoint=self._endpoint)
        metadata = get_hf_file_metadata(url, token=self._token)
        if not metadata.etag:
            raise DamagedDownload(f"{file.name}: the registry gives no ETag to know it by")
        etag = _as_file_name(metadata.etag)
        if (file.size or 0) > constants.MAX_HTTP_DOWNLOAD_SIZE:  # the hub serves these through Xet only, in one go
            if etag != metadata.etag:
                raise DamagedDownload(f"{file.name}: the registry gives an ETag that is no name for a file")
            path = hf_hub_download(
                self._repo,
                file.name,
                revision=self._revision,
                endpoint=self._endpoint,
                token=self._token,
                cache_dir=self._storage.parent,
            )
            self._on_bytes(file.size or 0)
            return Path(path)
        size = metadata.size if file.size is None else file.size
        if size is not None and size < 0:
            raise DamagedDownload(f"{file.name}: the registry gives a size of {size} bytes")
        blob = self._blobs / etag
        with self._locked(etag):
            if not _has_size(blob, size):
                blob.unlink(missing_ok=True)
                expected = file
                if file.sha256 is None and _is_sha256(metadata.etag):
                    expected = msgspec.structs.replace(file, sha256=metadata.etag)
                self._fetch(url, blob, expected, size)
            _point(pointer, blob)
        return pointer

    def sweep(self) -> None:
        """Remove parts that nobody works on, once a snapshot is whole: they are of files it has no use for."""
        for part in self._blobs.glob("*.partial"):
            with _try_lock(self._lock_path(part.stem)) as is_ours:
                if is_ours:
                    part.unlink(missing_ok=True)

    # ------------------------------------------------------------------ a blob

    def _fetch(self, url: str, blob: Path, file: RemoteFile, size: int | None) -> None:
        """A part that turns out to be of something else is thrown away, and the file fetched from its beginning: all
        files of a fetch end with the first one's error, and each would need a fetch of its own to find out."""
        partial = blob.with_name(f"{blob.name}.partial")
        is_resumed = _is_worth_resuming(partial)
        try:
            self._fetch_once(url, blob, file, size)
        except DamagedDownload as exc:
            if not is_resumed:
                raise
            logger.warning(
                "fetch begins anew file=%s: what was left of an earlier one is not of it: %s", file.name, exc
            )
            self._fetch_once(url, blob, file, size)

    def _fetch_once(self, url: str, blob: Path, file: RemoteFile, size: int | None) -> None:
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        partial = blob.with_name(f"{blob.name}.partial")
        try:
            with partial.open("r+b" if partial.exists() else "w+b", buffering=0) as raw:
                part = _Part(raw, file, size, self._limit(file, size), self._check, self._on_bytes)
                if part.num_bytes:
                    logger.info("fetch goes on file=%s from_bytes=%d of=%s", file.name, part.num_bytes, size)
                headers = build_hf_headers(token=self._token)
                http_get(url, part, resume_size=part.num_bytes, headers=headers, expected_size=size)  # type: ignore[arg-type]
                part.finish()
        except BaseException as exc:
            is_full = isinstance(exc, OSError) and exc.errno in _FULL  # that harms more than this fetch
            if isinstance(exc, DamagedDownload) or is_full or not _is_worth_resuming(partial):
                partial.unlink(missing_ok=True)
            raise
        partial.replace(blob)

    def _limit(self, file: RemoteFile, size: int | None) -> int:
        """The most bytes that the file may take: no registry's word fills the disk."""
        if "/" not in file.name and not file.name.endswith(SAFETENSORS):
            return max_bytes(file.name) if size is None else min(size, max_bytes(file.name))
        if size is not None:
            return size
        return int(shutil.disk_usage(self._blobs).free * _SHARE_FOR_THE_UNKNOWN)

    def _check(self) -> None:
        if self._cancelled():
            raise FetchCancelled

    # ------------------------------------------------------------------ places and locks

    @property
    def _blobs(self) -> Path:
        return self._storage / "blobs"

    def _lock_path(self, etag: str) -> Path:
        return self._storage.parent / ".locks" / self._storage.name / f"{etag}.lock"

    @contextmanager
    def _locked(self, etag: str) -> Iterator[None]:
        """Alone with this blob, among all processes. Raises `FetchCancelled` while it waits."""
        self._blobs.mkdir(parents=True, exist_ok=True)
        path = self._lock_path(etag)
        while True:
            with _try_lock(path) as is_ours:
                if is_ours:
                    yield
                    return
            if _WAIT.wait(_LOCK_POLL_S) or self._cancelled():
                raise FetchCancelled


_WAIT = threading.Event()  # never set: a wait between two tries of a lock that another process holds


class _Part:
    """The growing file, as `http_get` wants it; hashes what passes and stops when the fetch is called off."""

    def __init__(
        self,
        raw: IO[bytes],
        file: RemoteFile,
        size: int | None,
        limit: int,
        check: Callable[[], None],
        on_bytes: Callable[[int], None],
    ) -> None:
        self._raw = raw
        self._file = file
        self._size = size
        self._limit = limit
        self._check = check
        self._on_bytes = on_bytes
        self.num_bytes = 0
        self._hash = self._new_hash()
        self._take_up()

    def _take_up(self) -> None:
        """Go on from what is there, if that can be the beginning of this file."""
        there = os.fstat(self._raw.fileno()).st_size
        if there < RESUME_FROM_BYTES or self._size is None or there > self._size:
            if there:
                self._raw.truncate(0)
                self._on_bytes(-there)
            return
        while data := self._raw.read(_READ_BYTES):
            self._check()
            self._hash.update(data)
            self.num_bytes += len(data)

    def write(self, data: bytes) -> int:
        self._check()
        if self.num_bytes + len(data) > self._limit:
            announced = "no size was" if self._size is None else f"{self._size} were"
            raise DamagedDownload(
                f"{self._file.name} goes on after {self.num_bytes} bytes: {announced} announced, and at most "
                f"{self._limit} are taken"
            )
        view = memoryview(data)
        while view:  # unbuffered: a write may take only a part
            view = view[self._raw.write(view) :]
        self._hash.update(data)
        self.num_bytes += len(data)
        self._on_bytes(len(data))
        return len(data)

    def tell(self) -> int:
        return self.num_bytes

    def seek(self, position: int) -> int:
        """The server ignored the range: all over again."""
        if position != 0:
            raise OSError(errno.EINVAL, "a part is only rewound to its beginning")
        self._on_bytes(-self.num_bytes)
        self.num_bytes = 0
        self._hash = self._new_hash()
        return self._raw.seek(0)

    def truncate(self) -> int:
        return self._raw.truncate(self.num_bytes)

    def finish(self) -> None:
        """Check what came and put it on disk. Raises `DamagedDownload`."""
        file = self._file
        if self._size is not None and self.num_bytes != self._size:
            raise DamagedDownload(f"{file.name} has {self.num_bytes} bytes, {self._size} were announced")
        expected = file.sha256 or (file.git_sha1 if self._size is not None else None)
        if expected is not None and self._hash.hexdigest() != expected:
            self._on_bytes(-self.num_bytes)
            raise DamagedDownload(f"{file.name} does not have the hash {expected} that the registry names")
        os.fsync(self._raw.fileno())

    def _new_hash(self) -> _Hash:
        if self._file.sha256 is not None or self._size is None:
            return hashlib.sha256()
        digest = hashlib.sha1(usedforsecurity=False)
        digest.update(b"blob %d\0" % self._size)
        return digest


@contextmanager
def _try_lock(path: Path) -> Iterator[bool]:
    """Whether the lock was free; it is held inside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)


def _has_size(path: Path, size: int | None) -> bool:
    try:
        found = path.stat().st_size
    except OSError:
        return False  # absent, or a link that leads nowhere
    return size is None or found == size


def _is_worth_resuming(partial: Path) -> bool:
    try:
        return partial.stat().st_size >= RESUME_FROM_BYTES
    except OSError:
        return False


def _point(pointer: Path, blob: Path) -> None:
    """Let the snapshot name the blob, by a relative link as the library makes them."""
    pointer.parent.mkdir(parents=True, exist_ok=True)
    new = pointer.with_name(f"{pointer.name}.{os.getpid()}.{threading.get_ident()}")
    new.unlink(missing_ok=True)
    new.symlink_to(os.path.relpath(blob, pointer.parent))
    new.replace(pointer)


def _as_file_name(etag: str) -> str:
    """An ETag is a name in the cache, as the library has it; one that cannot be, or would lead elsewhere, is hashed."""
    if _FILE_NAME.fullmatch(etag):
        return etag
    return hashlib.sha256(etag.encode("utf-8", "surrogateescape")).hexdigest()


def _is_sha256(etag: str) -> bool:
    return len(etag) == 64 and all(char in "0123456789abcdef" for char in etag)

"""Snapshots from a registry that speaks the Hugging Face API: only the files a load needs, from the cache when offline.

All of it blocks: it runs on a thread of its own. Files that are complete are never fetched twice, and one that was
interrupted goes on where it was, also after the daemon's end (see `download`). Several come at a time. `refs/main` of
the cache is moved once a snapshot is whole.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from cortex_core.errors import ApiError
from cortex_core.fleet import LoadProgress, ModelSpec

from neuron.checkpoint.errors import CheckpointError
from neuron.checkpoint.files import INDEX_FILE, MAX_ENTRIES, max_bytes, read_json, read_text
from neuron.checkpoint.folder import check_folder, is_complete
from neuron.checkpoint.preflight import Layout, check_config, check_layout, is_small_file, refusal, refusing
from neuron.checkpoint.weight_files import read_index, select
from neuron.daemon.hub.bounded_answers import LISTING_TIMEOUT_S, EndlessAnswer
from neuron.daemon.hub.download import Connections, Downloader, FetchCancelled, RemoteFile
from neuron.daemon.hub.model_id import ModelId

logger = logging.getLogger(__name__)

ProgressCallback = Callable[[LoadProgress], None]
SizeCheck = Callable[[Mapping[str, Any], int], None]

CONNECTIONS = 4
"""Files that are fetched at a time: one connection rarely fills a fast line."""
_CONNECTIONS = Connections()
_REPORT_S = 0.25
# A commit's hash, of whichever hash; it becomes the name of a folder.
_REVISION = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,127}")
_SHA256, _SHA1 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")
_MAX_SMALL_FILES = 200
_LOCAL_ERRORS = {
    errno.ENOSPC: ("disk_full", "the disk is full"),
    errno.EDQUOT: ("disk_full", "the disk quota is used up"),
    errno.EFBIG: ("disk_full", "a file may not grow so large here"),
    errno.EACCES: ("permission_denied", "permission denied"),
    errno.EPERM: ("permission_denied", "permission denied"),
    errno.EROFS: ("permission_denied", "the file system is read-only"),
}


class Registry:
    """One endpoint. endpoint None is the library's own (`HF_ENDPOINT`, else the public hub).

    token: a string, False for anonymous, None for what the library finds (a stored login).
    """

    def __init__(self, *, endpoint: str | None, token: str | bool | None, cache_dir: Path | None) -> None:
        self._endpoint = endpoint
        self._token = token
        self._cache_dir = cache_dir

    def fetch(
        self,
        spec: ModelSpec,
        model: ModelId,
        *,
        on_progress: ProgressCallback,
        cancelled: threading.Event,
        before_weights: SizeCheck = lambda config, num_bytes: None,
    ) -> Path:
        """The snapshot folder of `model`, complete.

        before_weights gets config.json and the size of the weights before any of them is fetched, and may refuse.
        Raises `ApiError` (retryable where the cause may pass) and `FetchCancelled`.
        """
        with _CONNECTIONS:
            return self._fetch(spec, model, on_progress, cancelled, before_weights)

    def _fetch(
        self,
        spec: ModelSpec,
        model: ModelId,
        on_progress: ProgressCallback,
        cancelled: threading.Event,
        before_weights: SizeCheck,
    ) -> Path:
        from huggingface_hub import HfApi
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
        try:
            api = HfApi(endpoint=self._endpoint, token=self._token)
            info = api.model_info(model.repo, files_metadata=True, timeout=LISTING_TIMEOUT_S)
        except Exception as exc:
            snapshot = self._cached(spec, model)
            if snapshot is not None:
                logger.warning(
                    "registry lookup failed, the cached snapshot is used model=%s cause=%s", model, _cause(exc)
                )
                return snapshot
            raise fetch_error(spec, exc) from exc
        with refusing(spec):
            files = _listed(info.siblings or ())
        layout = check_layout(spec, files)
        if not isinstance(info.sha, str) or not _REVISION.fullmatch(info.sha):
            named = "no revision" if info.sha is None else f"the revision {str(info.sha)[:80]!r}, which is none,"
            raise refusal("repo_fetch_failed", f"The registry names {named} of `{model}`.", model_id=spec.model_id)
        try:
            return self._download(spec, model, info.sha, files, layout, on_progress, cancelled, before_weights)
        except (ApiError, FetchCancelled):
            raise
        except Exception as exc:
            raise fetch_error(spec, exc) from exc

    def _download(
        self,
        spec: ModelSpec,
        model: ModelId,
        revision: str,
        files: dict[str, RemoteFile],
        layout: Layout,
        on_progress: ProgressCallback,
        cancelled: threading.Event,
        before_weights: SizeCheck,
    ) -> Path:
        failed = threading.Event()
        meter = _Meter(on_progress)
        downloader = Downloader(
            self._storage(model),
            repo=model.repo,
            revision=revision,
            endpoint=self._endpoint,
            token=self._token,
            cancelled=lambda: cancelled.is_set() or failed.is_set(),
            on_bytes=meter.add,
        )
        small = sorted(name for name in files if is_small_file(name))
        with refusing(spec):
            _check_small([files[name] for name in small])
        config = downloader.get(files["config.json"])
        with refusing(spec, config.parent):
            hf_config = read_json(config)
            check_config(spec, hf_config)  # before anything large is touched
        if layout.is_sharded:
            downloader.get(files[INDEX_FILE])
        with refusing(spec, config.parent):
            weights = select(files, read_index(config.parent) if layout.is_sharded else None)
        before_weights(hf_config, _size([files[name] for name in weights]))
        wanted = [files[name] for name in (*small, *weights)]
        missing = [file for file in wanted if not downloader.is_here(file)]
        total, left = _size(wanted), _size(missing)
        there = min(downloader.partial_bytes(), left)
        self._check_space(spec, left - there)
        meter.begin(total - left + there, total)
        self._get_all(downloader, missing, failed)
        meter.end()
        snapshot = config.parent
        check_folder(spec, snapshot)
        self._point_main_at(model, revision)
        downloader.sweep()
        return snapshot

    @staticmethod
    def _get_all(downloader: Downloader, files: list[RemoteFile], failed: threading.Event) -> None:
        """Several at a time; the first error ends the others at their next bytes and is the one that counts."""

        def get(file: RemoteFile) -> None:
            try:
                downloader.get(file)
            except BaseException:
                failed.set()
                raise

        with ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="fetch") as pool:
            errors = [job.exception() for job in as_completed([pool.submit(get, file) for file in files])]
        first = next((error for error in errors if error and not isinstance(error, FetchCancelled)), None)
        error = first or next((error for error in errors if error), None)
        if error is not None:
            raise error

    # ------------------------------------------------------------------ the cache

    def _storage(self, model: ModelId) -> Path:
        from huggingface_hub import constants

        root = self._cache_dir or Path(constants.HF_HUB_CACHE)
        return root.expanduser() / f"models--{model.org}--{model.name}"

    def _cached(self, spec: ModelSpec, model: ModelId) -> Path | None:
        storage = self._storage(model)
        try:
            revision = read_text(storage / "refs" / "main").strip()
        except (OSError, CheckpointError):
            return None
        snapshot = storage / "snapshots" / revision
        return snapshot if _REVISION.fullmatch(revision) and is_complete(spec, snapshot) else None

    def _point_main_at(self, model: ModelId, revision: str) -> None:
        ref = self._storage(model) / "refs" / "main"
        ref.parent.mkdir(parents=True, exist_ok=True)
        new = ref.with_name(f"main.{os.getpid()}.{threading.get_ident()}")
        new.write_text(revision, encoding="utf-8")
        new.replace(ref)

    def _check_space(self, spec: ModelSpec, needed: int) -> None:
        from huggingface_hub import constants

        folder = (self._cache_dir or Path(constants.HF_HUB_CACHE)).expanduser()
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise refusal(
                "disk_full",
                f"`{spec.model_id}` needs {needed / 2**20:.0f} MiB more on disk, {free / 2**20:.0f} MiB are free.",
                model_id=spec.model_id,
                required_bytes=needed,
                free_bytes=free,
            )


class _Meter:
    """Reports bytes as they come, a few times a second; `add` may be called from several threads."""

    def __init__(self, on_progress: ProgressCallback) -> None:
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._done = 0
        self._total = 0
        self._reported = 0.0

    def begin(self, done: int, total: int) -> None:
        """From here on there is something to report: what came before were the few files that tell how much it is."""
        with self._lock:
            self._done, self._total = done, total
            self._report()

    def add(self, num_bytes: int) -> None:
        with self._lock:
            self._done += num_bytes
            if self._total and time.monotonic() - self._reported >= _REPORT_S:
                self._report()

    def end(self) -> None:
        with self._lock:
            self._done = self._total
            self._report()

    def _report(self) -> None:
        self._reported = time.monotonic()
        self._on_progress(LoadProgress("fetching", max(0, min(self._done, self._total)), self._total))


def _listed(siblings: Iterable[Any]) -> dict[str, RemoteFile]:
    """The files of a listing by name. Raises `CheckpointError` for one that is none."""
    files: dict[str, RemoteFile] = {}
    for sibling in siblings:
        name = sibling.rfilename
        if not isinstance(name, str):
            raise CheckpointError(f"the registry lists a file of the name {str(name)[:80]!r}")
        files[name] = _remote_file(sibling)
        if len(files) > MAX_ENTRIES:
            raise CheckpointError(f"the registry lists more than {MAX_ENTRIES} files, and no checkpoint has as many")
    return files


def _remote_file(sibling: Any) -> RemoteFile:
    """What the library knows of a file; registries that are not the public hub may leave most of it out."""
    lfs = getattr(sibling, "lfs", None)
    size = sibling.size
    return RemoteFile(
        sibling.rfilename,
        size=size if isinstance(size, int) and not isinstance(size, bool) and size >= 0 else None,
        sha256=_hash(getattr(lfs, "sha256", None), _SHA256),
        git_sha1=None if lfs is not None else _hash(getattr(sibling, "blob_id", None), _SHA1),
    )


def _hash(value: Any, form: re.Pattern[str]) -> str | None:
    return value if isinstance(value, str) and form.fullmatch(value) else None


def _check_small(files: Sequence[RemoteFile]) -> None:
    """Refuse small files that would not be read. Raises `CheckpointError`."""
    if len(files) > _MAX_SMALL_FILES:
        raise CheckpointError(
            f"{len(files)} configuration files and templates, and at most {_MAX_SMALL_FILES} are read"
        )
    for file in files:
        limit = max_bytes(file.name)
        if (file.size or 0) > limit:
            raise CheckpointError(
                f"{file.name} is too long: {file.size} bytes, and at most {limit} of such a file are read",
                file=file.name,
            )


def _size(files: Iterable[RemoteFile]) -> int:
    return sum(file.size or 0 for file in files)


def fetch_error(spec: ModelSpec, error: Exception) -> ApiError:
    """What a failed fetch means: 503 with Retry-After where trying again may help, else a 422 with the cause."""
    from huggingface_hub import errors

    cause = _cause(error)
    status = getattr(getattr(error, "response", None), "status_code", None)
    local = _LOCAL_ERRORS.get(error.errno or 0) if isinstance(error, OSError) else None
    if local is not None:
        kind, words = local
        message = f"`{spec.model_id}` could not be fetched: {words} ({cause})"
        return refusal(kind, message, model_id=spec.model_id, cause=cause)
    message = f"`{spec.model_id}` could not be fetched: {cause}"
    permanent: tuple[type[Exception], ...] = (
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
        errors.EntryNotFoundError,
        errors.OfflineModeIsEnabled,
        EndlessAnswer,
        ValueError,
    )
    if isinstance(error, errors.LocalEntryNotFoundError):  # a file it could not ask for, offline or not
        is_permanent = isinstance(error.__cause__, errors.OfflineModeIsEnabled)
    else:
        is_permanent = isinstance(error, permanent) or status in (400, 401, 403, 404, 410)
    if is_permanent:
        return refusal("repo_fetch_failed", message, model_id=spec.model_id, cause=cause)
    return ApiError(
        "overloaded",
        message,
        code="repo_fetch_failed",
        retry_after=10,
        extras={"kind": "repo_fetch_failed", "model_id": spec.model_id, "cause": cause},
    )


def _cause(error: Exception) -> str:
    """One line: the type and the first line of its text."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__

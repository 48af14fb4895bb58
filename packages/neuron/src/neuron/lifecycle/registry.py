"""Snapshots from a registry that speaks the Hugging Face API: only the files a load needs, from the cache when offline.

All of it blocks: it runs on a thread of its own. A file that was interrupted goes on where it was while the fetch
lives; files that are complete are never fetched twice. `refs/main` of the cache is moved once a snapshot is whole.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cortex_core.errors import ApiError
from cortex_core.fleet import LoadProgress, ModelSpec

from neuron.lifecycle.checkpoint_folder import check_folder, is_complete, read_json
from neuron.lifecycle.model_id import ModelId
from neuron.lifecycle.preflight import INDEX_FILE, check_config, check_layout, is_small_file, refusal, weight_files

logger = logging.getLogger(__name__)

ProgressCallback = Callable[[LoadProgress], None]

_POLL_S = 0.5
_LOCAL_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the file system is read-only",
}


class FetchCancelled(Exception):
    """The fetch was called off between two files."""


class Registry:
    """One endpoint. endpoint None is the library's own (`HF_ENDPOINT`, else the public hub).

    token: a string, False for anonymous, None for what the library finds (a stored login).
    """

    def __init__(self, *, endpoint: str | None, token: str | bool | None, cache_dir: Path | None) -> None:
        self._endpoint = endpoint
        self._token = token
        self._cache_dir = cache_dir

    def fetch(
        self, spec: ModelSpec, model: ModelId, *, on_progress: ProgressCallback, cancelled: threading.Event
    ) -> Path:
        """The snapshot folder of `model`, complete. Raises `ApiError` (retryable where the cause may pass) and
        `FetchCancelled`."""
        from huggingface_hub import HfApi
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
        try:
            api = HfApi(endpoint=self._endpoint, token=self._token)
            info = api.model_info(model.repo, files_metadata=True)
        except Exception as exc:
            snapshot = self._cached(spec, model)
            if snapshot is not None:
                logger.warning(
                    "registry lookup failed, the cached snapshot is used model=%s cause=%s", model, _cause(exc)
                )
                return snapshot
            raise fetch_error(spec, exc) from exc
        sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
        layout = check_layout(spec, sizes)
        if info.sha is None:
            raise refusal("repo_fetch_failed", f"The registry names no revision of `{model}`.", model_id=spec.model_id)
        try:
            return self._download(spec, model, info.sha, sizes, layout, on_progress, cancelled)
        except (ApiError, FetchCancelled):
            raise
        except Exception as exc:
            raise fetch_error(spec, exc) from exc

    def _download(
        self,
        spec: ModelSpec,
        model: ModelId,
        revision: str,
        sizes: dict[str, int],
        layout: Any,
        on_progress: ProgressCallback,
        cancelled: threading.Event,
    ) -> Path:
        small = sorted((name for name in sizes if is_small_file(name)), key=lambda name: name != "config.json")
        get = self._getter(model, revision, cancelled)
        snapshot = get("config.json").parent
        check_config(spec, read_json(snapshot / "config.json"))  # before anything large is touched
        index = read_json(get(INDEX_FILE)) if layout.is_sharded else None
        wanted = [*small, *weight_files(layout, index if isinstance(index, dict) else None)]
        total = sum(sizes[name] for name in wanted)
        done = sum(sizes[name] for name in wanted if (snapshot / name).exists())
        self._check_space(spec, total - done)
        with _Meter(self._storage(model) / "blobs", done, total, on_progress) as meter:
            for name in wanted:
                if not (snapshot / name).exists():
                    get(name)
                    meter.add(sizes[name])
        check_folder(spec, snapshot)
        self._point_main_at(model, revision)
        return snapshot

    def _getter(self, model: ModelId, revision: str, cancelled: threading.Event) -> Callable[[str], Path]:
        from huggingface_hub import hf_hub_download

        def get(name: str) -> Path:
            if cancelled.is_set():
                raise FetchCancelled
            path = hf_hub_download(
                model.repo,
                name,
                revision=revision,
                endpoint=self._endpoint,
                token=self._token,
                cache_dir=self._cache_dir,
            )
            return Path(path)

        return get

    # ------------------------------------------------------------------ the cache

    def _storage(self, model: ModelId) -> Path:
        from huggingface_hub import constants

        root = self._cache_dir or Path(constants.HF_HUB_CACHE)
        return root.expanduser() / f"models--{model.org}--{model.name}"

    def _cached(self, spec: ModelSpec, model: ModelId) -> Path | None:
        storage = self._storage(model)
        try:
            revision = (storage / "refs" / "main").read_text(encoding="utf-8").strip()
        except OSError:
            return None
        snapshot = storage / "snapshots" / revision
        return snapshot if revision and is_complete(spec, snapshot) else None

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
    """Reports bytes every half second: files that are done, and what partial files hold on disk right now."""

    def __init__(self, blobs: Path, done: int, total: int, on_progress: ProgressCallback) -> None:
        self._blobs = blobs
        self._done = done
        self._total = total
        self._on_progress = on_progress
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fetch-meter", daemon=True)

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        self._report()

    def __enter__(self) -> Self:
        self._report()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(_POLL_S):
            self._report()

    def _report(self) -> None:
        partial = sum(_sizes(self._blobs.glob("*.incomplete")))
        self._on_progress(LoadProgress("fetching", min(self._done + partial, self._total), self._total))


def _sizes(files: Iterable[Path]) -> Iterable[int]:
    for file in files:
        try:
            yield file.stat().st_size
        except OSError:
            continue  # it was finished, and moved, between the listing and the look


def fetch_error(spec: ModelSpec, error: Exception) -> ApiError:
    """What a failed fetch means: 503 with Retry-After where trying again may help, else a 422 with the cause."""
    from huggingface_hub import errors

    cause = _cause(error)
    status = getattr(getattr(error, "response", None), "status_code", None)
    local = _LOCAL_ERRORS.get(error.errno or 0) if isinstance(error, OSError) else None
    message = f"`{spec.model_id}` could not be fetched: {local or cause}"
    permanent: tuple[type[Exception], ...] = (
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
        errors.EntryNotFoundError,
        errors.OfflineModeIsEnabled,
        ValueError,
    )
    if isinstance(error, errors.LocalEntryNotFoundError):  # a file it could not ask for, offline or not
        is_permanent = isinstance(error.__cause__, errors.OfflineModeIsEnabled)
    else:
        is_permanent = isinstance(error, permanent) or local is not None or status in (400, 401, 403, 404, 410)
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

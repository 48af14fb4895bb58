"""A checkpoint that lies in a folder: the last check before an engine is started on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from cortex_core.errors import ApiError
from cortex_core.fleet import ModelSpec

from neuron.lifecycle.preflight import INDEX_FILE, check_config, check_layout, classify, refusal, weight_files


def check_folder(spec: ModelSpec, path: Path) -> int:
    """Refuse what cannot be served; returns the bytes of weights. Dangling links count as absent files.

    Raises `ApiError` 422.
    """
    if not path.is_dir():
        raise refusal("repo_fetch_failed", f"`{path}` is not a folder.", model_id=spec.model_id, cause="no such folder")
    try:
        names = [str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()]
        layout = check_layout(spec, names)
        check_config(spec, read_json(path / "config.json"))
        index = read_json(path / INDEX_FILE) if layout.is_sharded else None
        weights = weight_files(layout, index if isinstance(index, dict) else None)
        return sum((path / name).stat().st_size for name in weights)
    except OSError as exc:
        raise refusal(
            "repo_fetch_failed", f"`{path}` cannot be read: {exc}", model_id=spec.model_id, cause=str(exc)
        ) from exc


def weight_paths(path: Path) -> list[Path]:
    """The weight files of a folder that `check_folder` has passed. Raises `OSError`, `ApiError` 422."""
    layout = classify(file.name for file in path.iterdir() if file.is_file())
    index = read_json(path / INDEX_FILE) if layout.is_sharded else None
    return [path / name for name in weight_files(layout, index if isinstance(index, dict) else None)]


def is_complete(spec: ModelSpec, path: Path) -> bool:
    """Whether a folder of the cache holds everything a load would need."""
    try:
        check_folder(spec, path)
    except ApiError as exc:
        return exc.code not in ("empty_repo", "bad_checkpoint", "repo_fetch_failed")
    return True


def read_json(path: Path) -> Any:
    """Decoded JSON. Raises `OSError`, and `ApiError` 422 for a file that is no JSON."""
    try:
        return msgspec.json.decode(path.read_bytes())
    except msgspec.MsgspecError as exc:
        raise refusal("bad_checkpoint", f"{path.name} is not valid JSON: {exc}") from exc

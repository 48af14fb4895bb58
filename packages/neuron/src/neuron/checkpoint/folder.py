"""A checkpoint that lies in a folder: what is checked of it by its names and its config."""

from __future__ import annotations

from pathlib import Path

from cortex_core.errors import ApiError
from cortex_core.fleet import ModelSpec

from neuron.checkpoint.files import list_files, read_json
from neuron.checkpoint.preflight import check_config, check_layout, refusal, refusing
from neuron.checkpoint.weight_files import files_of


def check_folder(spec: ModelSpec, path: Path) -> int:
    """Refuse what cannot be served; returns the bytes of weights. Dangling links count as absent files.

    Raises `ApiError` 422.
    """
    if not path.is_dir():
        raise refusal("repo_fetch_failed", f"`{path}` is not a folder.", model_id=spec.model_id, cause="no such folder")
    with refusing(spec, path):
        check_layout(spec, list_files(path))
        check_config(spec, read_json(path / "config.json"))
        return sum(file.stat().st_size for file in weight_paths(path))


def weight_paths(path: Path) -> list[Path]:
    """The weight files of a folder. Raises `CheckpointError`, `OSError`."""
    files, _ = files_of(path)
    return [path / name for name in files]


def is_complete(spec: ModelSpec, path: Path) -> bool:
    """Whether a folder of the cache holds everything a load would need."""
    try:
        check_folder(spec, path)
    except ApiError as exc:
        return exc.code not in ("empty_repo", "bad_checkpoint", "repo_fetch_failed")
    return True

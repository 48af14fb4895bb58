"""Fetching from a registry, over real HTTP."""

from __future__ import annotations

import errno
import shutil
import threading
from pathlib import Path

import pytest
from cortex_core.errors import ApiError
from cortex_core.fleet import LoadProgress, ModelSpec
from neuron.daemon.hub.client import fetch_error
from neuron.daemon.hub.sources import DEMO_MODEL

from tests.neuron.daemon.hub.harness import FILES, SPEC, WEIGHTS, fetch, sources
from tests.neuron.daemon.hub.mock_registry import SHA, MockRegistry


def test_only_needed_files_are_fetched_with_progress_by_bytes(registry: MockRegistry, tmp_path: Path) -> None:
    progress: list[LoadProgress] = []
    folder = fetch(sources(registry, tmp_path), progress=progress)
    names = {file.name for file in folder.iterdir()}
    assert names == {name for name in FILES if FILES[name] != b"unwanted"}
    assert (folder / "model-1.safetensors").read_bytes() == WEIGHTS["model-1.safetensors"]
    assert registry.fetched()[0] == "config.json"
    total = sum(len(FILES[name]) for name in names)
    assert progress[-1] == LoadProgress("fetching", total, total)
    assert all(step.bytes_total == total for step in progress)
    assert [step.bytes_done for step in progress] == sorted(step.bytes_done for step in progress)


def test_a_model_that_cannot_fit_is_refused_before_its_weights_are_fetched(
    registry: MockRegistry, tmp_path: Path
) -> None:
    seen: list[tuple[object, int]] = []

    def refuse(config: object, num_bytes: int) -> None:
        seen.append((config, num_bytes))
        raise ApiError("invalid_request", "too large", code="insufficient_memory", status=422)

    with pytest.raises(ApiError) as caught:
        sources(registry, tmp_path).fetch(
            SPEC, on_progress=lambda progress: None, cancelled=threading.Event(), before_weights=refuse
        )
    assert caught.value.code == "insufficient_memory"
    assert seen == [({"model_type": "qwen3"}, sum(map(len, WEIGHTS.values())))]
    assert not set(WEIGHTS) & set(registry.fetched())


def test_what_is_there_is_not_fetched_again(registry: MockRegistry, tmp_path: Path) -> None:
    first = fetch(sources(registry, tmp_path))
    registry.requests.clear()
    (first / "model-2.safetensors").resolve().unlink()
    assert fetch(sources(registry, tmp_path)) == first
    assert set(WEIGHTS) & set(registry.fetched()) == {"model-2.safetensors"}


def test_F35_an_unreachable_registry_serves_from_the_cache(registry: MockRegistry, tmp_path: Path) -> None:
    found = sources(registry, tmp_path)
    folder = fetch(found)
    registry.stop()
    assert fetch(found) == folder


def test_a_cache_that_is_not_whole_is_not_served(registry: MockRegistry, tmp_path: Path) -> None:
    found = sources(registry, tmp_path)
    folder = fetch(found)
    (folder / "model-2.safetensors").resolve().unlink()
    registry.status = 503
    with pytest.raises(ApiError) as caught:
        fetch(found)
    assert caught.value.code == "repo_fetch_failed" and caught.value.is_retryable


def test_an_unreachable_registry_and_no_cache_is_worth_a_retry(registry: MockRegistry, tmp_path: Path) -> None:
    registry.stop()
    with pytest.raises(ApiError) as caught:
        fetch(sources(registry, tmp_path))
    assert caught.value.status == 503 and caught.value.is_retryable
    assert caught.value.extras["kind"] == "repo_fetch_failed"


def test_a_repository_that_does_not_exist_is_not_worth_one(registry: MockRegistry, tmp_path: Path) -> None:
    with pytest.raises(ApiError) as caught:
        fetch(sources(registry, tmp_path), ModelSpec("mock:acme/other"))
    assert caught.value.status == 422 and not caught.value.is_retryable
    assert caught.value.extras["model_id"] == "mock:acme/other"


def test_the_token_of_a_source_comes_from_its_variable(registry: MockRegistry, tmp_path: Path) -> None:
    registry.token = "secret"
    with pytest.raises(ApiError) as caught:
        fetch(sources(registry, tmp_path))
    assert caught.value.status == 422
    assert fetch(sources(registry, tmp_path, {"MOCK_TOKEN": "secret"})).name == SHA


def test_an_unsupported_architecture_is_refused_before_its_weights(registry: MockRegistry, tmp_path: Path) -> None:
    registry.files["config.json"] = b'{"model_type": "mamba"}'
    with pytest.raises(ApiError) as caught:
        fetch(sources(registry, tmp_path))
    assert caught.value.code == "unsupported_architecture"
    assert registry.fetched() == ["config.json"]


def test_gguf_and_empty_repositories_cost_one_request(registry: MockRegistry, tmp_path: Path) -> None:
    for files, code in (({"model-Q4_K_M.gguf": b""}, "gguf_unsupported"), ({"README.md": b""}, "empty_repo")):
        registry.files, registry.requests = files, []
        with pytest.raises(ApiError) as caught:
            fetch(sources(registry, tmp_path))
        assert caught.value.code == code and len(registry.requests) == 1


def test_too_little_disk_is_known_before_the_download(
    registry: MockRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(ApiError) as caught:
        fetch(sources(registry, tmp_path))
    assert caught.value.code == "disk_full" and caught.value.extras["free_bytes"] == 10
    assert not set(WEIGHTS) & set(registry.fetched())


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [
        (errno.ENOSPC, "disk_full", "disk is full"),
        (errno.EDQUOT, "disk_full", "quota"),
        (errno.EACCES, "permission_denied", "permission denied"),
        (errno.EROFS, "permission_denied", "read-only"),
    ],
)
def test_local_faults_are_named_and_permanent(number: int, code: str, words: str) -> None:
    error = fetch_error(SPEC, OSError(number, "errno text"))
    assert error.code == error.extras["kind"] == code
    assert words in error.message and error.status == 422 and not error.is_retryable


def test_ids_lead_to_their_source(registry: MockRegistry, tmp_path: Path) -> None:
    found = sources(registry, tmp_path)
    assert found.public_id("mock:acme/model") == found.public_id("huggingface:acme/model") == "acme/model"
    assert found.public_id("file:/models/x") == "file:/models/x"
    for text in ("nowhere:acme/model", "acme", ""):
        with pytest.raises(ApiError) as caught:
            found.parse(text)
        assert caught.value.status == 400 and caught.value.param == "model_id"


def test_a_folder_is_used_where_it_lies(registry: MockRegistry, tmp_path: Path) -> None:
    """What is in it, and whether it is there, a process of its own finds out."""
    assert fetch(sources(registry, tmp_path), ModelSpec(f"file:{tmp_path}/gone")) == tmp_path / "gone"


def test_the_demo_model_needs_no_registry(registry: MockRegistry, tmp_path: Path) -> None:
    found = sources(registry, tmp_path)
    try:
        folder = fetch(found, ModelSpec(DEMO_MODEL))
    except ApiError as exc:
        assert exc.code in ("empty_repo", "bad_checkpoint")  # a checkout without the trained weights
    else:
        assert (folder / "config.json").is_file()
    assert registry.requests == []

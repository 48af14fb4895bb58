"""Registries that lie: names and hashes that lead elsewhere, sizes that are none, answers without an end."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from cortex_core.errors import ApiError
from cortex_core.fleet import ModelSpec
from neuron.checkpoint.files import max_bytes
from neuron.daemon.common.config import EngineTables, SourceConfig
from neuron.daemon.hub import bounded_answers, download
from neuron.daemon.hub import client as registry_module
from neuron.daemon.hub.bounded_answers import MAX_LISTING_BYTES, max_bytes_of
from neuron.daemon.hub.sources import Sources

from tests.neuron.daemon.hub.mock_registry import SHA, MockRegistry

REPO = "acme/model"
SPEC = ModelSpec(f"mock:{REPO}")
LISTING = f"/api/models/{REPO}"
FILES = {
    "config.json": b'{"model_type": "qwen3"}',
    "tokenizer.json": b"{}",
    "model.safetensors": b"1" * 50_000,
}


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def registry() -> Iterator[MockRegistry]:
    with MockRegistry(REPO, dict(FILES)) as running:
        yield running


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The cache, deep enough for names that lead out of it."""
    return tmp_path / "a" / "b" / "cache"


def fetch(registry: MockRegistry, cache: Path) -> Path:
    source = SourceConfig(endpoint=registry.url, auth_env="", cache_dir=str(cache))
    found = Sources(EngineTables(sources={"mock": source}), environ={})
    return found.fetch(SPEC, on_progress=lambda progress: None, cancelled=threading.Event())


def refused(registry: MockRegistry, cache: Path) -> ApiError:
    with pytest.raises(ApiError) as caught:
        fetch(registry, cache)
    assert len(caught.value.message) < 1_000
    return caught.value


def outside_of(cache: Path) -> set[Path]:
    """Whatever lies beside the cache."""
    top = cache.parents[1]
    return {path for path in top.rglob("*") if not path.is_relative_to(cache) and not cache.is_relative_to(path)}


def url_of(name: str) -> str:
    return f"/{REPO}/resolve/{SHA}/{name}"


@pytest.mark.parametrize(
    "sha", ["../../../../evil", "..", "/etc", "a/b", "", ".hidden", "x" * 500, 7, ["a"], {}, "a\0b"]
)
def test_H8_a_revision_that_leads_elsewhere_is_refused(registry: MockRegistry, place: Path, sha: Any) -> None:
    registry.lies["sha"] = sha
    error = refused(registry, place)
    assert (error.status, error.code) == (422, "repo_fetch_failed") and "revision" in error.message
    assert not outside_of(place) and not list(place.rglob("*.json"))


@pytest.mark.parametrize("etag", ["../../../../evil", "/tmp/evil", "..", ".hidden", "a/b+c=", "x" * 300])
def test_H8_an_etag_that_leads_elsewhere_is_a_name_in_the_cache(registry: MockRegistry, place: Path, etag: str) -> None:
    registry.etags["model.safetensors"] = etag
    folder = fetch(registry, place)
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    blob = (folder / "model.safetensors").resolve()
    assert blob.parent == place / "models--acme--model" / "blobs" and len(blob.name) == 64
    assert not outside_of(place)


@pytest.mark.parametrize("name", ["../../evil.json", "/etc/evil.json", "../model.safetensors", "a/../../evil.jinja"])
def test_H8_names_that_lead_elsewhere_are_not_fetched(registry: MockRegistry, place: Path, name: str) -> None:
    registry.files[name] = b"evil"
    assert set(os.listdir(fetch(registry, place))) == set(FILES)  # noqa: PTH208
    assert not outside_of(place) and name not in registry.fetched()


@pytest.mark.parametrize("name", [7, None, ["config.json"], {"a": 1}])
def test_H8_names_that_are_none_are_refused(registry: MockRegistry, place: Path, name: Any) -> None:
    registry.lies["siblings"] = [{"rfilename": name, "size": 3}]
    error = refused(registry, place)
    assert error.status in (422, 503) and error.code in ("bad_checkpoint", "repo_fetch_failed")


@pytest.mark.parametrize("size", [-1, "12", 3.5, True, None, [], 10**30])
def test_H8_sizes_that_are_none_are_not_believed(registry: MockRegistry, place: Path, size: Any) -> None:
    registry.lies["siblings"] = [
        {"rfilename": name, "size": size if name == "model.safetensors" else len(data)} for name, data in FILES.items()
    ]
    if size == 10**30:
        assert refused(registry, place).code == "disk_full"
        return
    assert (fetch(registry, place) / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_H8_a_listing_without_end_is_given_up(registry: MockRegistry, place: Path) -> None:
    registry.endless[LISTING] = b" " * 65_536
    error = refused(registry, place)
    assert (error.status, error.code) == (422, "repo_fetch_failed") and str(MAX_LISTING_BYTES) in error.message
    assert MAX_LISTING_BYTES <= registry.num_sent < 2 * MAX_LISTING_BYTES


def test_H8_a_listing_that_comes_too_slowly_is_given_up(
    registry: MockRegistry, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded_answers, "MAX_SECONDS", 0.0)
    registry.endless[LISTING] = b" "
    assert "took more than 0 s" in refused(registry, place).message


@pytest.mark.parametrize("path", [LISTING, url_of("model.safetensors")])
def test_H8_an_error_without_end_is_given_up(registry: MockRegistry, place: Path, path: str) -> None:
    registry.endless[path] = b" " * 65_536
    if path != LISTING:
        fetch_small = registry._answer  # the small files come first
        registry.status = None

        def answer(request: Any, *, with_body: bool) -> None:
            registry.status = 404 if with_body and request.path == path else None
            fetch_small(request, with_body=with_body)

        registry._answer = answer  # type: ignore[method-assign]
    else:
        registry.status = 404
    assert refused(registry, place).code == "repo_fetch_failed"
    assert registry.num_sent < 8 * 2**20  # socket buffers


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_H8_a_file_without_end_is_given_up_at_its_size(registry: MockRegistry, place: Path, name: str) -> None:
    registry.endless[url_of(name)] = b"1" * 65_536
    error = refused(registry, place)
    assert error.code == "repo_fetch_failed" and f"{name} goes on after" in error.message
    assert f"at most {len(FILES[name])} are taken" in error.message
    assert not list(place.rglob("*.partial"))
    assert not list(place.rglob(f"snapshots/*/{name}"))


def test_H8_weights_of_no_size_leave_room_on_the_disk(
    registry: MockRegistry, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    registry.lies["siblings"] = [{"rfilename": name} for name in FILES]
    registry.endless[url_of("model.safetensors")] = b"1" * 65_536
    head = registry._send

    def without_length(request: Any, status: int, body: bytes, with_body: bool, headers: Any = None) -> None:
        if request.command == "HEAD" and request.path.endswith("model.safetensors"):
            request.send_response(status)
            for key, value in (headers or {}).items():
                request.send_header(key, value)
            request.send_header("transfer-encoding", "chunked")
            request.end_headers()
            return
        head(request, status, body, with_body, headers)

    registry._send = without_length  # type: ignore[method-assign]
    monkeypatch.setattr(download, "_SHARE_FOR_THE_UNKNOWN", 1e-6)
    error = refused(registry, place)
    assert "no size was announced" in error.message
    assert not list(place.rglob("*.partial"))


def test_H8_a_small_file_that_is_large_is_not_fetched(registry: MockRegistry, place: Path) -> None:
    size = max_bytes("tokenizer_config.json") + 1
    registry.lies["siblings"] = [
        *({"rfilename": name, "size": len(data)} for name, data in FILES.items()),
        {"rfilename": "tokenizer_config.json", "size": size},
    ]
    error = refused(registry, place)
    assert error.code == "bad_checkpoint" and error.extras["file"] == "tokenizer_config.json"
    assert str(size) in error.message and registry.fetched() == []


def test_H8_very_many_files_are_refused(registry: MockRegistry, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "MAX_ENTRIES", 100)
    registry.lies["siblings"] = [{"rfilename": f"{index}.txt"} for index in range(101)]
    assert "more than 100 files" in refused(registry, place).message
    registry.lies["siblings"] = [{"rfilename": f"{index}.jinja", "size": 1} for index in range(99)]
    monkeypatch.setattr(registry_module, "_MAX_SMALL_FILES", 50)
    registry.lies["siblings"] += [{"rfilename": name, "size": 1} for name in ("config.json", "tokenizer.json")]
    registry.lies["siblings"] = [*registry.lies["siblings"][2:], {"rfilename": "model.safetensors", "size": 1}]
    assert "configuration files and templates, and at most 50" in refused(registry, place).message


@pytest.mark.parametrize("lie", [{"siblings": 5}, {"siblings": ["a"]}, {"siblings": [{}]}, {"siblings": {"a": 1}}])
def test_H8_a_listing_of_another_shape_is_an_error_with_a_type(
    registry: MockRegistry, place: Path, lie: dict[str, Any]
) -> None:
    registry.lies |= lie
    error = refused(registry, place)
    assert error.status in (422, 503) and error.code in ("repo_fetch_failed", "empty_repo", "bad_checkpoint")


def test_H8_redirects_in_a_circle_end(registry: MockRegistry, place: Path) -> None:
    registry.redirects[LISTING] = f"{registry.url}{LISTING}"
    assert refused(registry, place).code == "repo_fetch_failed"
    assert len(registry.requests) < 100


def test_the_library_is_told_of_the_bounds() -> None:
    """Otherwise the tests above would hold what another version does."""
    bounded_answers.limit_answers()
    session: Any = huggingface_hub.get_session()
    assert bounded_answers._limit in session.event_hooks["response"]
    huggingface_hub.close_session()
    assert max_bytes_of(200, "/acme/model/resolve/main/model.safetensors") is None
    assert json.dumps(max_bytes_of(302, "/x")) == "262144"

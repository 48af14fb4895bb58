"""Fetching from a registry, over real HTTP."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from cortex_core.errors import ApiError
from cortex_core.fleet import LoadProgress, ModelSpec
from neuron.daemon.common.config import EngineTables, SourceConfig
from neuron.daemon.hub import client as registry_module
from neuron.daemon.hub import download
from neuron.daemon.hub.client import fetch_error
from neuron.daemon.hub.download import FetchCancelled
from neuron.daemon.hub.sources import DEMO_MODEL, Sources

from tests.neuron.daemon.hub.mock_registry import SHA, MockRegistry

REPO = "acme/model"
SPEC = ModelSpec(f"mock:{REPO}")
WEIGHTS = {"model-1.safetensors": b"1" * 50_000, "model-2.safetensors": b"2" * 30_000}
FILES = {
    "README.md": b"unwanted",
    "config.json": b'{"model_type": "qwen3"}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    ).encode(),
    **WEIGHTS,
    "consolidated.safetensors": b"unwanted",
    "onnx/model.onnx": b"unwanted",
}


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def registry() -> Iterator[MockRegistry]:
    with MockRegistry(REPO, dict(FILES)) as running:
        yield running


def sources(registry: MockRegistry, cache: Path, environ: dict[str, str] | None = None) -> Sources:
    source = SourceConfig(endpoint=registry.url, auth_env="MOCK_TOKEN", cache_dir=str(cache))
    return Sources(EngineTables(sources={"mock": source}), environ=environ or {})


def fetch(found: Sources, spec: ModelSpec = SPEC, progress: list[LoadProgress] | None = None) -> Path:
    seen = progress if progress is not None else []
    return found.fetch(spec, on_progress=seen.append, cancelled=threading.Event())


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


def test_an_interrupted_file_goes_on_where_it_was(
    registry: MockRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    registry.cut_once["model-1.safetensors"] = 20_000
    folder = fetch(sources(registry, tmp_path))
    assert (folder / "model-1.safetensors").read_bytes() == WEIGHTS["model-1.safetensors"]
    assert registry.ranges == ["bytes=20000-"]


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a few kilobytes count, and arrive in steps of one."""
    monkeypatch.setattr(download, "RESUME_FROM_BYTES", 1_000)
    monkeypatch.setattr(registry_module, "_REPORT_S", 0.0)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1_000)


def interrupted(found: Sources, at_bytes: int) -> None:
    """A fetch that is called off when so many bytes are there."""
    cancelled = threading.Event()

    def cancel(progress: LoadProgress) -> None:
        if progress.bytes_done >= at_bytes:
            cancelled.set()

    with pytest.raises(FetchCancelled):
        found.fetch(SPEC, on_progress=cancel, cancelled=cancelled)


def parts(cache: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in cache.rglob("*.partial")}


@pytest.mark.usefixtures("small_steps")
def test_what_was_fetched_of_a_file_outlives_the_daemon(registry: MockRegistry, tmp_path: Path) -> None:
    registry.is_hub = True
    interrupted(sources(registry, tmp_path), 40_000)
    left = parts(tmp_path)
    assert left and 1_000 < sum(left.values()) < 80_000
    registry.requests.clear()
    progress: list[LoadProgress] = []
    folder = fetch(sources(registry, tmp_path), progress=progress)  # as the next daemon would
    assert sorted(registry.ranges) == sorted(f"bytes={size}-" for size in left.values())
    assert progress[0].bytes_done >= sum(left.values()), "what is there is not fetched and not waited for"
    assert progress[-1].bytes_done == progress[-1].bytes_total
    for name, data in WEIGHTS.items():
        assert (folder / name).read_bytes() == data
    assert parts(tmp_path) == {}


@pytest.mark.usefixtures("small_steps")
def test_a_part_of_something_else_is_found_out_and_thrown_away(registry: MockRegistry, tmp_path: Path) -> None:
    """However many there are: the error of one ends the fetch of all, so each would need another fetch."""
    registry.is_hub = True
    found = sources(registry, tmp_path)
    interrupted(found, 40_000)
    for part in tmp_path.rglob("*.partial"):
        part.write_bytes(b"?" * part.stat().st_size)
    num_parts = len(parts(tmp_path))
    assert num_parts
    folder = fetch(found)
    assert len(registry.ranges) >= num_parts, "they were gone on with"
    for name, data in WEIGHTS.items():
        assert (folder / name).read_bytes() == data
    assert parts(tmp_path) == {}


@pytest.mark.parametrize("name", ["model-1.safetensors", "tokenizer.json"])
def test_a_file_that_is_not_what_the_registry_says_never_gets_its_name(
    registry: MockRegistry, tmp_path: Path, name: str
) -> None:
    registry.is_hub = True
    registry.sent_instead[name] = FILES[name][:-1] + b"!"
    found = sources(registry, tmp_path)
    with pytest.raises(ApiError, match=f"{name} does not have the hash") as caught:
        fetch(found)
    assert caught.value.status == 503 and caught.value.is_retryable
    snapshot = tmp_path / "models--acme--model" / "snapshots" / SHA
    assert not (snapshot / name).exists() and parts(tmp_path) == {}
    registry.stop()
    with pytest.raises(ApiError):
        fetch(found)  # offline, too: it is not whole


def test_a_file_that_a_power_cut_left_short_is_fetched_again(registry: MockRegistry, tmp_path: Path) -> None:
    found = sources(registry, tmp_path)
    folder = fetch(found)
    blob = (folder / "model-1.safetensors").resolve()
    blob.write_bytes(b"1" * 1_000)
    assert fetch(found) == folder
    assert (folder / "model-1.safetensors").read_bytes() == WEIGHTS["model-1.safetensors"]


def test_a_full_disk_is_named_and_left_with_room(registry: MockRegistry, tmp_path: Path) -> None:
    """The kernel says ENOSPC at every write to /dev/full."""
    registry.is_hub = True
    blobs = tmp_path / "models--acme--model" / "blobs"
    blobs.mkdir(parents=True)
    part = blobs / f"{hashlib.sha256(WEIGHTS['model-2.safetensors']).hexdigest()}.partial"
    part.symlink_to("/dev/full")
    with pytest.raises(ApiError, match="the disk is full") as caught:
        fetch(sources(registry, tmp_path))
    error = caught.value
    assert (error.status, error.code, error.extras["kind"]) == (422, "disk_full", "disk_full")
    assert not part.is_symlink(), "the part that met the end of the disk is gone"
    folder = fetch(sources(registry, tmp_path))  # once there is room, it goes on with what is whole
    assert (folder / "model-2.safetensors").read_bytes() == WEIGHTS["model-2.safetensors"]


def test_a_fetch_waits_for_another_process_that_fetches_the_same(registry: MockRegistry, tmp_path: Path) -> None:
    registry.is_hub = True
    etag = hashlib.sha256(WEIGHTS["model-1.safetensors"]).hexdigest()
    lock = tmp_path / ".locks" / "models--acme--model" / f"{etag}.lock"
    lock.parent.mkdir(parents=True)
    cancelled = threading.Event()
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        outcome: list[BaseException] = []

        def run() -> None:
            try:
                sources(registry, tmp_path).fetch(SPEC, on_progress=lambda progress: None, cancelled=cancelled)
            except BaseException as exc:
                outcome.append(exc)

        fetching = threading.Thread(target=run)
        fetching.start()
        fetching.join(0.5)
        assert fetching.is_alive() and "model-1.safetensors" not in registry.fetched()
        cancelled.set()
        fetching.join(30)
    assert [type(exc) for exc in outcome] == [FetchCancelled], "whoever waits can be called off"
    assert (fetch(sources(registry, tmp_path)) / "model-1.safetensors").is_file()


def test_files_beyond_plain_http_go_through_the_library(
    registry: MockRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Xet itself is a service of the public hub: here the library's function is recorded, and fetches plainly."""
    monkeypatch.setattr(huggingface_hub.constants, "MAX_HTTP_DOWNLOAD_SIZE", 40_000)
    asked: list[str] = []

    def hf_hub_download(repo: str, name: str, *, cache_dir: Path, revision: str, **_: object) -> str:
        asked.append(name)
        path = cache_dir / "models--acme--model" / "snapshots" / revision / name
        path.write_bytes(registry.files[name])
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    progress: list[LoadProgress] = []
    fetch(sources(registry, tmp_path), progress=progress)
    assert asked == ["model-1.safetensors"]
    assert progress[-1].bytes_done == progress[-1].bytes_total


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


def test_a_cancelled_fetch_stops_between_files(registry: MockRegistry, tmp_path: Path) -> None:
    cancelled = threading.Event()
    found = sources(registry, tmp_path)

    def cancel(progress: LoadProgress) -> None:
        cancelled.set()

    with pytest.raises(FetchCancelled):
        found.fetch(SPEC, on_progress=cancel, cancelled=cancelled)
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

"""Files from a registry: whole or not at all, and gone on with where they broke off."""

from __future__ import annotations

import fcntl
import hashlib
import threading
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest
from cortex_core.errors import ApiError
from cortex_core.fleet import LoadProgress
from neuron.daemon.hub import client as registry_module
from neuron.daemon.hub import download
from neuron.daemon.hub.download import FetchCancelled
from neuron.daemon.hub.sources import Sources

from tests.neuron.daemon.hub.harness import FILES, SPEC, WEIGHTS, fetch, sources
from tests.neuron.daemon.hub.mock_registry import SHA, MockRegistry


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a few kilobytes count, and arrive in steps of one."""
    monkeypatch.setattr(download, "RESUME_FROM_BYTES", 1_000)
    monkeypatch.setattr(registry_module, "_REPORT_S", 0.0)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1_000)


def test_an_interrupted_file_goes_on_where_it_was(
    registry: MockRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    registry.cut_once["model-1.safetensors"] = 20_000
    folder = fetch(sources(registry, tmp_path))
    assert (folder / "model-1.safetensors").read_bytes() == WEIGHTS["model-1.safetensors"]
    assert registry.ranges == ["bytes=20000-"]


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


def test_a_cancelled_fetch_stops_between_files(registry: MockRegistry, tmp_path: Path) -> None:
    cancelled = threading.Event()
    found = sources(registry, tmp_path)

    def cancel(progress: LoadProgress) -> None:
        cancelled.set()

    with pytest.raises(FetchCancelled):
        found.fetch(SPEC, on_progress=cancel, cancelled=cancelled)
    assert not set(WEIGHTS) & set(registry.fetched())

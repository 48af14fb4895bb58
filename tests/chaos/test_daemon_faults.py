"""What happens to the daemon, to its disk and to its clients, and what is left of it: nothing that nobody wants."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from neuron.daemon.hub.sources import demo_model_path

from tests.chaos.harness import CHAT, CONFIG, MODEL, Neuron, eventually, running
from tests.neuron.daemon.hub.mock_registry import MockRegistry

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600), pytest.mark.slow]

REPO = "acme/demo"
ONLINE = {"HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
QUESTION = {"messages": [{"role": "user", "content": "What is 12+30?"}], "temperature": 0, "max_tokens": 40}
ENDLESS = {"messages": [{"role": "user", "content": "Count from 1 to 60."}], "ignore_eos": True, "max_tokens": 20_000}
SLOW_LOAD = {"lever": "slow_disk", "seconds_per_mb": 0.5}


def remembering(folder: Path, *more: str) -> str:
    """A configuration whose neuron comes back with what it served."""
    top = f'state_dir = "{folder}/state"\n'
    return top + CONFIG + "\n".join(more)


async def kill(neuron: Neuron) -> None:
    """SIGKILL to the daemon, and to nobody else; returns when every process of it is gone."""
    engines = neuron.engine_pids()
    os.kill(neuron.pid, signal.SIGKILL)
    await neuron.process.wait()
    await eventually(
        lambda: not any(Path(f"/proc/{pid}").exists() for pid in engines.values()),
        lambda: f"engines outlive their daemon: {engines}",
    )


async def is_activated(neuron: Neuron) -> bool:
    return bool((await neuron.get("/health"))["activation"]["state"] == "ready")


@pytest.fixture
def registry() -> Iterator[MockRegistry]:
    """The demo model, as the public hub would offer it."""
    folder = demo_model_path()
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    files["model.safetensors"] = _padded(files["model.safetensors"], 8_000_000)
    with MockRegistry(REPO, files) as running_registry:
        running_registry.is_hub = True
        yield running_registry


def with_registry(registry: MockRegistry, folder: Path) -> str:
    source = f'[harness.candle.sources.mock]\nendpoint = "{registry.url}"\ncache_dir = "{folder}/cache"\n'
    return remembering(folder, source)


# ---------------------------------------------------------------------- the daemon dies


async def test_a_killed_daemon_leaves_no_engine_and_comes_back_with_what_it_served(tmp_path: Path) -> None:
    config = remembering(tmp_path)
    async with running(tmp_path, config=config) as neuron:
        await neuron.load(max_model_len=2048)
        asking = asyncio.create_task(neuron.ask(ENDLESS))
        await eventually(lambda: _in_flight(neuron, 1))
        await kill(neuron)
        with pytest.raises(Exception):  # noqa: B017  (its connection broke, however the client puts it)
            await asking
    async with running(tmp_path, config=config) as neuron:
        await eventually(lambda: is_activated(neuron))
        model = await neuron.model()
        assert model["status"] == "loaded" and model["limit"]["context"] == 2048, "as it was asked for"
        assert "42" in (await neuron.ask(QUESTION)).text
        assert len(neuron.engine_pids()) == 1
        await neuron.unload()
        await kill(neuron)
    async with running(tmp_path, config=config) as neuron:
        assert await is_activated(neuron) and await neuron.get("/models") == [], "it was unloaded, and stays so"


async def test_a_daemon_killed_while_it_loads_leaves_no_engine_and_does_not_take_the_load_for_done(
    tmp_path: Path,
) -> None:
    config = remembering(tmp_path)
    async with running(tmp_path, config=config) as neuron:
        loading = asyncio.create_task(neuron.load(MODEL, SLOW_LOAD))
        await eventually(lambda: _phase(neuron, "weights"))
        await kill(neuron)
        loading.cancel()
    async with running(tmp_path, config=config) as neuron:
        assert await is_activated(neuron) and await neuron.get("/models") == []


async def test_H7_a_daemon_killed_behind_each_of_its_loads_goes_on_coming_back(tmp_path: Path) -> None:
    config = remembering(tmp_path)
    async with running(tmp_path, config=config) as neuron:
        await neuron.load(max_model_len=2048)
        await kill(neuron)
    for _ in range(3):
        async with running(tmp_path, config=config) as neuron:
            await eventually(lambda: _has_status(neuron, "loaded"))
            await kill(neuron)
    async with running(tmp_path, config=config) as neuron:
        await eventually(lambda: _has_status(neuron, "loaded"))
        assert (await neuron.get("/health"))["activation"]["failed"] == []
        assert "42" in (await neuron.ask(QUESTION)).text


@pytest.mark.full
async def test_H7_a_model_that_takes_its_daemon_down_waits_after_three_times(tmp_path: Path) -> None:
    """The daemon is killed in each load at start, as an out-of-memory killer would do it."""
    config = remembering(tmp_path)
    async with running(tmp_path, config=config) as neuron:
        await neuron.load(MODEL, SLOW_LOAD)
        await kill(neuron)
    for _ in range(3):
        async with running(tmp_path, config=config) as neuron:
            await eventually(lambda: _phase(neuron, "weights"))
            await kill(neuron)
    async with running(tmp_path, config=config) as neuron:
        await eventually(lambda: is_activated(neuron))
        (failure,) = (await neuron.get("/health"))["activation"]["failed"]
        assert failure["model_id"] == MODEL and "3 times in a row" in failure["error"]
        assert failure["retry_at"] > 0 and "after 60 s" in failure["error"]
        await neuron.load()  # by hand it is tried again
        assert "42" in (await neuron.ask(QUESTION)).text


async def test_a_fetch_goes_on_where_a_killed_daemon_left_it(tmp_path: Path, registry: MockRegistry) -> None:
    weights = registry.files["model.safetensors"]
    part = len(weights) - 1_000_000  # the library hands bytes over in blocks of ten megabytes
    registry.stalls["model.safetensors"] = part
    config = with_registry(registry, tmp_path)
    async with running(tmp_path, config=config, environ=ONLINE) as neuron:
        loading = asyncio.create_task(neuron.load(f"mock:{REPO}"))
        await eventually(lambda: any(size >= 10_000_000 for size in _parts(tmp_path)))
        await kill(neuron)
        loading.cancel()
    left = max(_parts(tmp_path))
    registry.released.set()
    registry.stalls.clear()
    async with running(tmp_path, config=config, environ=ONLINE) as neuron:
        await neuron.load(f"mock:{REPO}")
        assert f"bytes={left}-" in registry.ranges, "it asked for the rest only"
        status, answer = await neuron.call("POST", CHAT, {"model": REPO, **QUESTION})
        assert status == 200 and "42" in answer["choices"][0]["message"]["content"]
        assert _parts(tmp_path) == []


# ---------------------------------------------------------------------- the disk is full


async def test_a_disk_that_fills_up_during_a_fetch_is_named_and_the_next_try_completes(
    tmp_path: Path, registry: MockRegistry
) -> None:
    """Simulated for one file, which lies on /dev/full: there the kernel answers every write with ENOSPC."""
    blobs = tmp_path / "cache" / "models--acme--demo" / "blobs"
    blobs.mkdir(parents=True)
    etag = hashlib.sha256(registry.files["model.safetensors"]).hexdigest()
    (blobs / f"{etag}.partial").symlink_to("/dev/full")
    async with running(tmp_path, config=with_registry(registry, tmp_path), environ=ONLINE) as neuron:
        await neuron.load()
        before = await neuron.belongings()
        status, answer = await neuron.call("POST", "/models/load", {"model_id": f"mock:{REPO}"})
        assert (status, answer["error"]["code"], answer["error"]["kind"]) == (422, "disk_full", "disk_full")
        assert "the disk is full" in answer["error"]["message"]
        assert _parts(tmp_path) == [] and not (blobs / etag).exists()
        assert [model["id"] for model in await neuron.get("/models")] == [MODEL], "it leaves no trace"
        assert "42" in (await neuron.ask(QUESTION)).text, "what is served goes on"
        await neuron.leaves_nothing_behind(before)
        await neuron.load(f"mock:{REPO}")
        assert len(await neuron.get("/models")) == 2


# ---------------------------------------------------------------------- the client goes


async def test_a_client_that_leaves_in_any_phase_leaves_nothing(tmp_path: Path) -> None:
    config = CONFIG + "[harness.candle.admission]\nmax_in_flight = 1\n"
    async with running(tmp_path, config=config) as neuron:
        before = await neuron.belongings()

        loading = asyncio.create_task(neuron.load(MODEL, SLOW_LOAD))  # while it loads
        await eventually(lambda: _phase(neuron, "weights"))
        loading.cancel()
        await eventually(lambda: _has_status(neuron, "loaded"))

        decoding = asyncio.create_task(neuron.ask(ENDLESS))  # while it decodes, and while another waits in the queue
        await eventually(lambda: _has_metric(neuron, "neuron_engine_running", 1))
        queued = [asyncio.create_task(neuron.ask(QUESTION, stream=stream)) for stream in (True, False)]
        await eventually(lambda: _queued(neuron, 2))
        for task in queued:
            task.cancel()
        await eventually(lambda: _queued(neuron, 0))
        assert not decoding.done()
        decoding.cancel()
        await eventually(lambda: _in_flight(neuron, 0))
        await neuron.holds_no_pages()

        words = {"messages": [{"role": "user", "content": "the quick brown fox jumps over the lazy dog " * 2_000}]}
        for stream in (True, False):  # while its prompt is computed
            prefilling = asyncio.create_task(neuron.ask({**words, "max_tokens": 5}, stream=stream))
            await eventually(lambda: _has_metric(neuron, "neuron_engine_running", 1))
            prefilling.cancel()
            await eventually(lambda: _in_flight(neuron, 0))
            await neuron.holds_no_pages()

        assert "42" in (await neuron.ask(QUESTION)).text
        await neuron.unload()
        await neuron.leaves_nothing_behind(before)


@pytest.mark.full
async def test_a_client_that_leaves_a_fetch_does_not_end_it(tmp_path: Path, registry: MockRegistry) -> None:
    registry.stalls["model.safetensors"] = 1_000
    async with running(tmp_path, config=with_registry(registry, tmp_path), environ=ONLINE) as neuron:
        before = await neuron.belongings()
        model = f"mock:{REPO}"
        asking = asyncio.create_task(neuron.load(model))
        await eventually(lambda: "model.safetensors" in registry.fetched())
        asking.cancel()
        assert (await neuron.model(REPO))["status"] == "fetching"
        await neuron.unload(REPO)  # and an unload does
        await neuron.leaves_nothing_behind(before)
        registry.released.set()
        registry.stalls.clear()
        await neuron.load(model)


# ---------------------------------------------------------------------- looking


def _padded(weights: bytes, num_bytes: int) -> bytes:
    """The same tensors behind a longer header: the format allows spaces after its JSON."""
    length = int.from_bytes(weights[:8], "little")
    return (
        (length + num_bytes).to_bytes(8, "little") + weights[8 : 8 + length] + b" " * num_bytes + weights[8 + length :]
    )


def _parts(folder: Path) -> list[int]:
    return [path.stat().st_size for path in (folder / "cache").rglob("*.partial")]


async def _phase(neuron: Neuron, phase: str) -> bool:
    progress: dict[str, Any] = (await neuron.model()).get("progress") or {}
    return progress.get("phase") == phase


async def _has_status(neuron: Neuron, status: str) -> bool:
    return (await neuron.model()).get("status") == status


async def _in_flight(neuron: Neuron, number: int) -> bool:
    return (await neuron.health()).get("in_flight") == number


async def _queued(neuron: Neuron, number: int) -> bool:
    return (await neuron.health()).get("queue_depth") == number


async def _has_metric(neuron: Neuron, name: str, value: float) -> bool:
    return await neuron.metric(name, model=MODEL) == value

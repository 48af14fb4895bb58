"""Loads that are watched, and what is loaded again after the daemon's end, over a real socket and scripted engines."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
from neuron.daemon.common.config import EngineSection, NeuronConfig

from tests.neuron.daemon.api.harness import RunningNeuron, run_neuron
from tests.neuron.scripted_engine import eventually, scripted_with


async def read_events(response: aiohttp.ClientResponse) -> list[tuple[str, Any]]:
    assert response.status == 200 and response.content_type == "text/event-stream"
    events = []
    for block in (await response.text()).split("\n\n"):
        if block.startswith("event: "):
            name, data = block.split("\n")
            events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return events


async def follow_load(neuron: RunningNeuron) -> list[tuple[str, Any]]:
    body = json.dumps({"model_id": neuron.model})
    headers = {"accept": "text/event-stream"}
    async with neuron.client.post(neuron.url + "/models/load", data=body, headers=headers) as response:
        return await read_events(response)


async def activation(neuron: RunningNeuron) -> dict[str, Any]:
    """What `/health` says of the loads at start, once they are done."""
    async with asyncio.timeout(30):
        while (found := (await neuron.get("/health"))["activation"])["state"] != "ready":
            await asyncio.sleep(0.01)
    return dict(found)


async def test_a_load_can_be_followed_by_who_asked_and_by_others(checkpoint: Path, gate: Path) -> None:
    async with run_neuron(checkpoint, load=False, command=scripted_with("--gate", str(gate))) as neuron:
        asking = asyncio.create_task(follow_load(neuron))
        await eventually(lambda: bool(neuron.daemon.services.manager.all()))
        await eventually(lambda: neuron.served.state.progress.phase == "weights")

        async def look_on() -> list[tuple[str, Any]]:
            path = f"{neuron.url}/models/{quote(neuron.model, safe='')}/progress"
            async with neuron.client.get(path) as response:
                return await read_events(response)

        looking = asyncio.create_task(look_on())
        await eventually(lambda: len(neuron.daemon.services.manager._watchers[neuron.model]._waiting) == 2)
        await asyncio.to_thread(gate.write_text, "go")
        asked, seen = await asking, await looking
        assert asked[-1] == ("done", {"status": "loaded"})
        assert seen[-1] == ("done", {"status": "loaded", "error": None})
        for events in (asked, seen):
            assert {name for name, _ in events[:-1]} == {"progress"}
            weights = [data["progress"] for _, data in events if (data.get("progress") or {}).get("phase") == "weights"]
            assert (weights[0]["bytes_done"], weights[0]["bytes_total"]) == (10, 100) and "eta_s" in weights[0]
        assert await follow_load(neuron) == [("done", {"status": "loaded"})], "loaded already"


async def test_a_followed_load_that_fails_ends_with_its_error(checkpoint: Path) -> None:
    async with run_neuron(checkpoint, load=False, command=scripted_with("--load", "die")) as neuron:
        name, data = (await follow_load(neuron))[-1]
        assert name == "error" and data["error"]["code"] == "load_failed" and "out of luck" in data["error"]["message"]
        refused = json.dumps({"model_id": "no-slash"})
        headers = {"accept": "text/event-stream"}
        async with neuron.client.post(neuron.url + "/models/load", data=refused, headers=headers) as response:
            assert response.status == 400, "what is refused at once is an HTTP error"


async def test_a_load_that_is_not_done_at_its_deadline_is_ended_with_its_reason(checkpoint: Path, gate: Path) -> None:
    config = NeuronConfig(engine=EngineSection(load_deadline_s=0.5, stop_grace_s=2.0))
    command = scripted_with("--gate", str(gate))
    async with run_neuron(checkpoint, config=config, load=False, command=command) as neuron:
        status, _, body = await neuron.post("/models/load", {"model_id": neuron.model})
        error = json.loads(body)["error"]
        assert (status, error["code"], error["kind"]) == (500, "load_failed", "load_timeout")
        (model,) = await neuron.get("/models")
        assert model["status"] == "failed" and "not done after" in model["error"]
        for pid in neuron.served.group.pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)


async def test_a_follower_that_leaves_ends_nothing_and_leaves_no_trace(checkpoint: Path, gate: Path) -> None:
    async with run_neuron(checkpoint, load=False, command=scripted_with("--gate", str(gate))) as neuron:
        asking = asyncio.create_task(follow_load(neuron))
        await eventually(lambda: bool(neuron.daemon.services.manager.all()))
        await eventually(lambda: neuron.served.state.phase == "loading" and neuron.served.load_waiters != [])
        asking.cancel()
        await eventually(lambda: neuron.served.load_waiters == [])
        assert neuron.served.state.phase == "loading"
        await asyncio.to_thread(gate.write_text, "go")
        await eventually(lambda: neuron.served.state.phase == "loaded")


async def test_a_neuron_comes_back_with_what_it_served(checkpoint: Path, tmp_path: Path) -> None:
    config = NeuronConfig(state_dir=str(tmp_path / "state"), engine=EngineSection(stop_grace_s=2.0))
    async with run_neuron(checkpoint, config=config) as neuron:
        model = neuron.model
    async with run_neuron(checkpoint, config=config, load=False) as neuron:
        assert (await activation(neuron))["completed"] == [model]
        assert neuron.served.state.phase == "loaded"
        assert (await neuron.post("/models/unload", {"model_id": model}))[0] == 200
    async with run_neuron(checkpoint, config=config, load=False) as neuron:
        assert (await activation(neuron))["completed"] == [] and await neuron.get("/models") == []


async def test_what_does_not_come_back_says_why_and_can_be_taken_off_the_list(checkpoint: Path, tmp_path: Path) -> None:
    config = NeuronConfig(state_dir=str(tmp_path / "state"), engine=EngineSection(stop_grace_s=2.0))
    folder = tmp_path / "gone"
    folder.symlink_to(checkpoint)
    async with run_neuron(folder, config=config) as neuron:
        model = neuron.model
    folder.unlink()
    for _ in range(2):  # it stays listed: a disk that is not mounted now may be back later
        async with run_neuron(checkpoint, config=config, load=False) as neuron:
            (failure,) = (await activation(neuron))["failed"]
            assert failure["model_id"] == model and "not a folder" in failure["error"]
    async with run_neuron(checkpoint, config=config, load=False) as neuron:
        await activation(neuron)
        assert (await neuron.post("/models/unload", {"model_id": model}))[0] == 404
    async with run_neuron(checkpoint, config=config, load=False) as neuron:
        assert (await activation(neuron))["failed"] == []

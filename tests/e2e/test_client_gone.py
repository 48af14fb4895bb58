"""A client that hangs up ends its request on the neuron, in every phase, also through translation."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.e2e.departures import PHASES, WAYS, Departures
from tests.e2e.fleet_process import MODEL, call


@pytest.fixture(scope="module")
def departures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Departures]:
    running = Departures(tmp_path_factory.mktemp("gone"))
    yield running
    running.stop()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("way", WAYS)
def test_a_client_that_hangs_up_leaves_nothing_behind(departures: Departures, way: str, phase: str) -> None:
    async def leave() -> None:
        async with departures:
            await departures.until(departures.is_idle)
            await departures.leave(way, phase)
            await departures.until(departures.is_idle)

    asyncio.run(leave())


@pytest.mark.timeout(300)
def test_clients_that_hang_up_while_their_model_loads_leave_the_load_alone(departures: Departures) -> None:
    async def leave() -> None:
        async with departures:
            await departures.until(departures.is_idle)
            gateway = departures.gateways["native"]
            status, _, answer = call(gateway.url, "POST", "/admin/models/unload", {"model": MODEL})
            assert status == 200, answer
            asking = [asyncio.create_task(departures.ask("native", stream=stream)) for stream in (True, False)]

            async def are_waiting() -> bool:
                waiting = (await departures.get(gateway.url + "/admin/fleet"))["waiting"]
                return [queue["requests"] for queue in waiting] == [2]

            await departures.until(are_waiting)
            for each in asking:
                each.cancel()

            async def is_gone() -> bool:
                held = await departures.held()
                return not (held["native waiting"] or held["native in flight"])

            async def is_loaded() -> bool:
                models = await departures.get(departures.neuron_url + "/models")
                return any((model["id"], model["status"]) == (MODEL, "loaded") for model in models)

            await departures.until(is_gone)
            await departures.until(is_loaded)
            await departures.until(departures.is_idle)

    asyncio.run(leave())

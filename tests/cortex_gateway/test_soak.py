"""After a mixed load nothing of a request is left: no object, no task, no descriptor, no place that is taken.

The load is that of `tests/bench/soak.py`, which goes on for longer and watches the memory of a process.
"""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from pathlib import Path

import pytest
from cortex_core.catalogue import Catalogue
from cortex_core.gateway_config import Http1Parser
from cortex_gateway.http.body import RequestBody
from cortex_gateway.http.client_writer import ClientWriter
from cortex_gateway.http.http1.connection import Http1Connection
from cortex_gateway.http.http1.cycle import RequestCycle
from cortex_gateway.placement.placement import Lease
from cortex_gateway.relay.client_disconnect import DisconnectWatch
from cortex_gateway.relay.request_state import RequestState
from cortex_gateway.relay.sse_relay import SseRelay
from cortex_gateway.relay.upstream_timeout import UpstreamTimeout
from cortex_gateway.server import RunningGateway, running
from cortex_gateway.translation.translation import TranslatedStream
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.protocol.http_stream import HTTPStream

from tests.bench.soak import ask_of, backends, config, gauges
from tests.bench.soak_load import Load

OF_A_REQUEST = (
    *(
        RequestState,
        RequestBody,
        DisconnectWatch,
        Lease,
        UpstreamTimeout,
        SseRelay,
        TranslatedStream,
        ClientWriter,
    ),
    *(RequestCycle, Http1Connection, TCPServer, HTTPStream),
)


def held() -> list[object]:
    """Objects of requests and connections that something still holds."""
    gc.collect()
    return [each for each in gc.get_objects() if type(each).__name__ in NAMES]


def left(earlier: list[object]) -> Counter[str]:
    """What is held beside `earlier`, by type. The list keeps those alive, so that no address is taken twice."""
    known = {id(each) for each in earlier}
    return Counter(type(each).__name__ for each in held() if id(each) not in known)


NAMES = frozenset(each.__name__ for each in OF_A_REQUEST) | {"GatewayConnection"}


def num_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def settled(started: RunningGateway, earlier: list[object]) -> None:
    """No request and no client's connection is left; the kernel tells nobody when the last one is closed."""
    async with asyncio.timeout(30):
        while started.gateway.relay.num_active or any(left(earlier).values()):
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("parser", ["httptools", pytest.param("h11", marks=pytest.mark.full)])
async def test_a_mixed_load_leaves_nothing_behind(parser: Http1Parser) -> None:
    earlier = held()  # by tests before this one: their failures, logs and fixtures
    async with backends() as neurons, running(config(neurons, parser), Catalogue(), grace_s=0) as started:
        gateway = started.gateway
        async with asyncio.timeout(30):
            while any(node.health == "unknown" for node in gateway.fleet.snapshot.nodes.values()):
                await gateway.fleet.changed()
        await Load(started.url, ask_of).run(requests=200, events=0, clients=8)  # opens the connections to the neurons
        await settled(started, earlier)
        tasks, descriptors = len(asyncio.all_tasks()), num_descriptors()
        load = Load(started.url, ask_of)
        await load.run(requests=600, events=1500, clients=8)
        assert {200, 400, 401, 404, 422, 429} <= set(load.statuses), load.statuses
        await settled(started, earlier)
        assert not gateway.relay._active and gateway.relay._body_memory.held == 0
        assert not any((await asyncio.to_thread(gauges, started.metrics_url + "/metrics")).values())
        async with asyncio.timeout(30):
            while len(asyncio.all_tasks()) > tasks or num_descriptors() > descriptors:
                await asyncio.sleep(0.1)

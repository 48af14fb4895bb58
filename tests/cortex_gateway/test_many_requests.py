"""More requests at once than a gateway has descriptors for, which HTTP/2 brings over one connection."""

from __future__ import annotations

import asyncio
import json
from urllib.parse import urlsplit

import h2.config
import h2.connection
import h2.events

from .fake_neuron import FakeNeuron
from .gateway_client import MODEL, Start

BODY = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}).encode()


async def test_O2_streams_of_one_connection_do_not_use_up_the_descriptors(neuron: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL)
    neuron.answer_gate.clear()
    client = await start(neuron)
    client.started.gateway.relay.max_active = 5
    address = urlsplit(client.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
    connection.initiate_connection()
    for number in range(20):
        stream_id = 2 * number + 1
        path = "/v1/chat/completions" if number % 2 else "/v1/messages"
        headers = [(":method", "POST"), (":path", path), (":scheme", "http"), (":authority", "localhost")]
        connection.send_headers(stream_id, headers)
        connection.send_data(stream_id, BODY, end_stream=True)
    writer.write(connection.data_to_send())
    status: dict[int, str] = {}
    bodies: dict[int, bytes] = {}

    async def until_ended(count: int) -> None:
        async with asyncio.timeout(30):
            num_ended = len([1 for body in bodies.values() if body.endswith(b"}")])
            while num_ended < count:
                for event in connection.receive_data(await reader.read(65536)):
                    if isinstance(event, h2.events.ResponseReceived):
                        status[event.stream_id] = dict(event.headers)[":status"]
                    elif isinstance(event, h2.events.DataReceived):
                        bodies[event.stream_id] = bodies.get(event.stream_id, b"") + event.data
                    elif isinstance(event, h2.events.StreamEnded):
                        num_ended += 1
                writer.write(connection.data_to_send())

    await until_ended(15)
    assert sorted(status.values()) == ["503"] * 8 + ["529"] * 7 or sorted(status.values()) == ["503"] * 7 + ["529"] * 8
    for stream_id, body in bodies.items():
        error = json.loads(body)["error"]
        assert "5 requests under way" in error["message"], (stream_id, body)
    assert client.started.gateway.relay.num_active == 5
    neuron.answer_gate.set()
    await client.started.gateway.relay.wait_idle()
    writer.close()

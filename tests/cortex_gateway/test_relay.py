from __future__ import annotations

from .conftest import MODEL, Start
from .fake_neuron import FakeNeuron


async def test_a_chat_request_is_answered(neuron: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL)
    client = await start(neuron)
    status, answer = await client.chat()
    assert status == 200, answer
    async with client.post("/v1/chat/completions", {"model": MODEL, "stream": True, "messages": []}) as response:
        assert response.status == 200
        print(await response.read(), response.headers)
    async with client.get("/v1/models") as response:
        print(await response.read())
    async with client.get("/admin/fleet") as response:
        print(await response.read())

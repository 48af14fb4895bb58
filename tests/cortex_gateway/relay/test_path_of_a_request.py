"""How much a reader has to open to follow one request."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import cortex_gateway

from tests.cortex_gateway.fake_neuron import FakeNeuron
from tests.cortex_gateway.gateway_client import MODEL, Client, Start

ROOT = str(Path(cortex_gateway.__file__).parent)
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": True}
MAX_FILES = 20


async def streamed(client: Client) -> bytes:
    async with client.post("/v1/chat/completions", CHAT) as response:
        assert response.status == 200
        return await response.read()


async def files_of(client: Client) -> set[str]:
    """The gateway's files of which something runs while a chat is answered. Nothing else goes on meanwhile but what
    happens once a second."""
    files: set[str] = set()

    def on_call(frame: FrameType, event: str, argument: Any) -> None:
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(ROOT):
            files.add(name[len(ROOT) + 1 :])

    sys.setprofile(on_call)
    try:
        assert await streamed(client)
    finally:
        sys.setprofile(None)
    return files


async def test_a_warm_streamed_chat_passes_through_few_files(start: Start, neuron: FakeNeuron) -> None:
    neuron.have(MODEL)
    client = await start(neuron, poll={"interval_s": 3600.0})
    await streamed(client)
    files = min([await files_of(client) for _ in range(3)], key=len)
    assert {"relay/relay.py", "http/client_writer.py"} < files
    assert len(files) <= MAX_FILES, sorted(files)


def test_one_class_writes_the_bytes_of_answers() -> None:
    """Others only pass messages on, or frame them for the wire."""
    writers = [
        str(file.relative_to(ROOT))
        for file in sorted(Path(ROOT).rglob("*.py"))
        if '"type": "http.response.' in file.read_text()
    ]
    assert writers == ["http/client_writer.py"]

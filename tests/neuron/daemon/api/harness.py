"""A whole daemon on a real socket, in this process, with engines that are scripted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from cortex_core.fleet import ModelInfo, ModelSpec
from cortex_core.sse import SseDecoder, SseEvent
from neuron.daemon.api.asgi import Message
from neuron.daemon.api.exchange import Exchange
from neuron.daemon.common.config import EngineSection, NeuronConfig, ServerSection
from neuron.daemon.lifecycle.served_model import ServedModel
from neuron.daemon.server import Daemon
from neuron.daemon.supervisor.process_group import WorkerCommand

from tests.neuron.checkpoint_folders import write_checkpoint
from tests.neuron.scripted_engine import scripted_command

CHAT, COMPLETIONS, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"


def make_checkpoint(folder: Path) -> Path:
    """A folder that passes every check; its weights are never read."""
    return write_checkpoint(folder)


class RunningNeuron:
    """A daemon that serves, and a client of it. `model` is loaded."""

    def __init__(self, daemon: Daemon, url: str, model: str, client: aiohttp.ClientSession) -> None:
        self.daemon = daemon
        self.url = url
        self.model = model
        self.client = client

    @property
    def served(self) -> ServedModel:
        model = self.daemon.services.manager.find(self.model)
        assert model is not None
        return model

    async def post(
        self, path: str, body: Any, headers: dict[str, str] | None = None
    ) -> tuple[int, aiohttp.typedefs.LooseHeaders, bytes]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.client.post(self.url + path, data=data, headers=headers) as response:
            return response.status, response.headers, await response.read()

    async def get(self, path: str) -> Any:
        async with self.client.get(self.url + path) as response:
            assert response.status == 200, await response.text()
            return json.loads(await response.read())

    def chat(self, text: str = "hi", **settings: Any) -> dict[str, Any]:
        return {
            "model": self.model,
            "max_tokens": 3,
            "messages": [{"role": "user", "content": text}],
            **settings,
        }


@asynccontextmanager
async def run_neuron(
    folder: Path,
    *,
    config: NeuronConfig | None = None,
    load: bool = True,
    command: WorkerCommand = scripted_command,
    **server: Any,
) -> AsyncIterator[RunningNeuron]:
    # Tests kill engines at leisure: no death counts as one of a series.
    config = config or NeuronConfig(engine=EngineSection(stable_after_s=0, stop_grace_s=2.0))
    config = msgspec.structs.replace(config, host="127.0.0.1", port=0)
    if server:
        config = msgspec.structs.replace(config, server=ServerSection(**server))
    daemon = Daemon(config, command=command)
    url = daemon.bind()
    serving = asyncio.create_task(daemon.serve())
    model = f"file:{folder}"
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60)) as client:
        try:
            if load:
                await daemon.services.manager.load(ModelSpec(model))
            yield RunningNeuron(daemon, url, model, client)
        finally:
            daemon.request_stop()
            daemon.request_stop()
            await serving


class Server:
    """What the exchange receives is put into `incoming`; what it sends is in `sent`."""

    def __init__(self, *messages: Message) -> None:
        self.incoming: asyncio.Queue[Message] = asyncio.Queue()
        self.sent: list[Message] = []
        self.may_send = asyncio.Event()
        self.may_send.set()
        for message in messages:
            self.incoming.put_nowait(message)

    async def send(self, message: Message) -> None:
        await self.may_send.wait()
        self.sent.append(message)

    def exchange(self, method: str = "POST", path: str = "/v1/messages", **limits: Any) -> Exchange:
        scope = {"type": "http", "method": method, "path": path, "headers": [], "http_version": "1.1"}
        return Exchange(scope, self.incoming.get, self.send, ServerSection(**limits))

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


def error_of(path: str, body: bytes) -> dict[str, Any]:
    """The error object, after checking the envelope of the route's dialect."""
    document = json.loads(body)
    error = document["error"]
    assert isinstance(error["message"], str) and error["message"]
    assert "Traceback" not in error["message"] and "<html" not in body.decode().lower()
    if path.removeprefix("/v1").startswith("/messages"):
        assert document["type"] == "error" and document["request_id"].startswith("req_")
    else:
        assert set(error) >= {"message", "type", "param", "code"}
        assert error["code"] is None or isinstance(error["code"], str)
    return dict(error)


def events_of(body: bytes) -> list[SseEvent]:
    decoder = SseDecoder()
    return [event for event in decoder.feed(body) if isinstance(event, SseEvent)]


def text_of(body: bytes) -> str:
    chunks = [json.loads(event.data) for event in events_of(body) if event.data != "[DONE]"]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


def body_for(neuron: RunningNeuron, path: str, **settings: Any) -> dict[str, Any]:
    if path == COMPLETIONS:
        return {"model": neuron.model, "prompt": "hi", "max_tokens": 3, **settings}
    return neuron.chat(**settings)


def spelled(neuron: RunningNeuron, token_ids: list[int]) -> str:
    assert neuron.served.text is not None
    return b"".join(map(neuron.served.text.tokens.token_bytes, token_ids)).decode("utf-8", "replace")


def said(path: str, body: bytes, stream: bool) -> tuple[str, str]:
    """The text of an answer, and how it ended."""
    chunks = [json.loads(event.data) for event in events_of(body) if event.data != "[DONE]"] if stream else []
    if path == MESSAGES:
        if not stream:
            answer = json.loads(body)
            return answer["content"][0]["text"], answer["stop_reason"]
        text = "".join(chunk["delta"].get("text", "") for chunk in chunks if chunk["type"] == "content_block_delta")
        (reason,) = (chunk["delta"]["stop_reason"] for chunk in chunks if chunk["type"] == "message_delta")
        return text, reason
    if not stream:
        (choice,) = json.loads(body)["choices"]
        return choice["text"] if path == COMPLETIONS else choice["message"]["content"], choice["finish_reason"]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    text = "".join(
        choice.get("text") or "" if path == COMPLETIONS else choice["delta"].get("content") or "" for choice in choices
    )
    (reason,) = (choice["finish_reason"] for choice in choices if choice["finish_reason"])
    return text, reason


async def models_of(neuron: RunningNeuron) -> list[ModelInfo]:
    return msgspec.convert(await neuron.get("/models"), list[ModelInfo])

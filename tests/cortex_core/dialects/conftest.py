"""Official clients whose transport answers from memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import httpx2
import openai
import pytest


def _transport(status: int, content_type: str, body: bytes, headers: dict[str, str]) -> httpx2.MockTransport:
    def answer(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(status, headers={"content-type": content_type, **headers}, content=body)

    return httpx2.MockTransport(answer)


@pytest.fixture
def openai_client() -> Iterator[Callable[..., openai.OpenAI]]:
    """Called with (status, content_type, body, headers={}): a client that gets this answer to whatever it asks."""
    clients: list[Any] = []

    def make(status: int, content_type: str, body: bytes, headers: dict[str, str] | None = None) -> openai.OpenAI:
        transport = _transport(status, content_type, body, headers or {})
        client = openai.OpenAI(
            api_key="k",
            base_url="http://gateway.test/v1",
            max_retries=0,
            http_client=httpx2.Client(transport=transport),
        )
        clients.append(client)
        return client

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def anthropic_client() -> Iterator[Callable[..., anthropic.Anthropic]]:
    """The same for the other dialect."""
    clients: list[Any] = []

    def make(status: int, content_type: str, body: bytes, headers: dict[str, str] | None = None) -> anthropic.Anthropic:
        transport = _transport(status, content_type, body, headers or {})
        client = anthropic.Anthropic(
            api_key="k",
            base_url="http://gateway.test",
            max_retries=0,
            http_client=httpx2.Client(transport=transport),
        )
        clients.append(client)
        return client

    yield make
    for client in clients:
        client.close()

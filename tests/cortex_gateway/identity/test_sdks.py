"""The official SDKs against keys and limits: each raises what it raises for its vendor, and retries what it should."""

from __future__ import annotations

import asyncio
from pathlib import Path

import anthropic
import openai
import pytest
from cortex_gateway.identity.credentials import hash_text

from tests.cortex_gateway.fake_neuron import FakeNeuron
from tests.cortex_gateway.gateway_client import MODEL, Start

MESSAGES = [{"role": "user", "content": "hi"}]


def key(secret: str, **limits: object) -> dict[str, object]:
    return {"key_id": secret, "hash": hash_text(secret), **limits}


@pytest.fixture
def keys() -> list[dict[str, object]]:
    return [
        key("open"),
        key("narrow", models=["else"]),
        key("slow", requests_per_minute=1),
        key("poor", budgets=[{"tokens": 1}]),
    ]


async def test_openai(neuron: FakeNeuron, start: Start, keys: list[dict[str, object]], tmp_path: Path) -> None:
    neuron.have(MODEL)
    section = {"require_auth": True, "store": f"sqlite:{tmp_path}/cortex.db", "keys": keys}
    client = await start(neuron, entitlements=section)

    def ask(secret: str) -> object:
        with openai.OpenAI(base_url=f"{client.url}/v1", api_key=secret, max_retries=0) as sdk:
            return sdk.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=5)  # type: ignore[arg-type]

    await asyncio.to_thread(ask, "open")
    with pytest.raises(openai.AuthenticationError):
        await asyncio.to_thread(ask, "nobody")
    with pytest.raises(openai.PermissionDeniedError):
        await asyncio.to_thread(ask, "narrow")
    await asyncio.to_thread(ask, "slow")
    with pytest.raises(openai.RateLimitError) as limited:
        await asyncio.to_thread(ask, "slow")
    assert limited.value.code == "rate_limit_exceeded" and int(limited.value.response.headers["retry-after"]) > 0


@pytest.mark.parametrize("style", ["bearer", "x-api-key"])
async def test_anthropic_with_old_and_new_authentication(
    neuron: FakeNeuron, start: Start, keys: list[dict[str, object]], tmp_path: Path, style: str
) -> None:
    """SDKs of API version 2023-06-01 send `x-api-key`; newer ones send the key as a bearer token."""
    neuron.have(MODEL)
    section = {"require_auth": True, "store": f"sqlite:{tmp_path}/cortex.db", "keys": keys}
    client = await start(neuron, entitlements=section)

    def ask(secret: str) -> object:
        old = {"x-api-key": secret, "authorization": anthropic.Omit(), "anthropic-version": "2023-06-01"}
        headers = old if style == "x-api-key" else None
        with anthropic.Anthropic(base_url=client.url, api_key=secret, max_retries=0) as sdk:
            return sdk.messages.with_raw_response.create(
                model=MODEL,
                messages=MESSAGES,  # type: ignore[arg-type]
                max_tokens=5,
                extra_headers=headers,  # type: ignore[arg-type]
            )

    await asyncio.to_thread(ask, "open")
    with pytest.raises(anthropic.AuthenticationError):
        await asyncio.to_thread(ask, "nobody")
    with pytest.raises(anthropic.PermissionDeniedError):
        await asyncio.to_thread(ask, "narrow")
    await asyncio.to_thread(ask, "slow")
    with pytest.raises(anthropic.RateLimitError) as limited:
        await asyncio.to_thread(ask, "slow")
    assert limited.value.response.headers["anthropic-ratelimit-requests-remaining"] == "0"


async def test_a_spent_balance_is_asked_once_and_not_again(
    neuron: FakeNeuron, start: Start, keys: list[dict[str, object]], tmp_path: Path
) -> None:
    """SDKs repeat a 429 by default; `x-should-retry: false` tells them that nothing would change."""
    neuron.have(MODEL)
    client = await start(neuron, entitlements={"store": f"sqlite:{tmp_path}/cortex.db", "keys": keys})

    def ask_openai() -> None:
        with openai.OpenAI(base_url=f"{client.url}/v1", api_key="poor", max_retries=5) as sdk:
            sdk.chat.completions.create(model=MODEL, messages=MESSAGES)  # type: ignore[arg-type]

    def ask_anthropic() -> None:
        with anthropic.Anthropic(base_url=client.url, api_key="poor", max_retries=5) as sdk:
            sdk.messages.create(model=MODEL, messages=MESSAGES, max_tokens=5)  # type: ignore[arg-type]

    for number, (ask, error) in enumerate(
        ((ask_openai, openai.RateLimitError), (ask_anthropic, anthropic.RateLimitError)), start=1
    ):
        with pytest.raises(error):
            await asyncio.to_thread(ask)
        assert await client.metric("cortex_key_refusals_total", key="poor", reason="budget") == number
    assert not neuron.requests

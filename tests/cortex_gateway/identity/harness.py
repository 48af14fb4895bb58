"""Budgets, reservations and settlements of one key."""

from __future__ import annotations

import json
from typing import Any

from cortex_core.entitlements import Budget, KeyEntry, Window
from cortex_gateway.identity.credentials import hash_text, new_key
from cortex_gateway.identity.store import Hold, KeyRecord, Settlement, Share
from cortex_gateway.identity.windows import Slots

from tests.cortex_gateway.gateway_client import MODEL, Client

from .fake_clock import NOW

CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
SECRET = new_key()

CAP = 1000
WINDOW = 300
ENTRY = KeyEntry(
    key_id="ci",
    key="secret",
    requests_per_minute=50,
    tokens_per_minute=2000,
    max_concurrent_requests=6,
    budgets=(Budget(tokens=CAP),),
)
BODY = json.dumps({"model": "m", "messages": [], "max_tokens": WINDOW}).encode()

HOUR = 3_600_000

TTL = 60_000
BUDGETS = (
    (Budget(tokens=100), 100),
    (Budget(tokens=60, window=Window("fixed", 3600)), 60),
    (Budget(tokens=40, window=Window("rolling", 600)), 40),
)


def shares(*amounts: int) -> tuple[Share, ...]:
    return tuple(
        Share(budget.name, Slots.of(budget.window), cap, amount)
        for (budget, cap), amount in zip(BUDGETS, amounts, strict=False)
    )


def hold(hold_id: str, *amounts: int, key: str = "ci", owner: str = "gw", ttl_ms: int = TTL) -> Hold:
    return Hold(hold_id, key, owner, ttl_ms, shares(*amounts))


def settlement(hold_id: str, *amounts: int, key: str = "ci") -> Settlement:
    return Settlement(hold_id, key, shares(*amounts))


def record(name: str, secret: str, created_ms: int = NOW) -> KeyRecord:
    return KeyRecord(KeyEntry(key_id=name, hash=hash_text(secret), models=("a*",)), created_ms)


def bearer(secret: str = SECRET) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


async def ask(
    client: Client, headers: dict[str, str] | None = None, *, path: str = CHAT, **fields: Any
) -> tuple[int, dict[str, Any], dict[str, str]]:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 10, **fields}
    async with client.post(path, body, headers=headers or {}) as response:
        return response.status, json.loads(await response.read()), {k.lower(): v for k, v in response.headers.items()}

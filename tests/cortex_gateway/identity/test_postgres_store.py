"""A store in PostgreSQL, shared by gateways."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest
from cortex_gateway.identity.postgres_store import PostgresStore
from cortex_gateway.identity.store import StoreError

from tests.cortex_gateway.identity.harness import hold, settlement

from .postgres_server import PostgresServer

T = TypeVar("T")


async def test_gateways_that_share_a_postgres_cannot_overshoot_together(postgres: PostgresServer) -> None:
    url = postgres.new_url()
    gateways = [PostgresStore(url) for _ in range(3)]
    await asyncio.gather(*(gateway.open() for gateway in gateways))  # all create the tables at once

    async def spend(gateway: PostgresStore, owner: str) -> int:
        count = 0
        for number in range(30):
            name = f"{owner}-{number}"
            if await gateway.reserve(hold(name, 3, owner=owner)) is None:
                real = 1 if number % 2 else 3
                await gateway.settle([settlement(name, real)])
                count += real
        return count

    spent = sum(await asyncio.gather(*(spend(gateway, str(number)) for number, gateway in enumerate(gateways))))
    assert spent == sum(used.amount for used in await gateways[0].usage())
    assert 98 <= spent <= 100, "spent to the last request that fits"
    for gateway in gateways:
        await gateway.close()


async def again(work: Callable[[], Awaitable[T]]) -> T:
    """As the gateway does: what failed on a dead connection is tried on the next. A pool has four."""
    for _ in range(8):
        try:
            return await work()
        except StoreError:
            continue
    return await work()


async def test_a_postgres_that_restarts_is_found_again(postgres: PostgresServer) -> None:
    store = postgres.new_store()
    await store.open()
    await store.reserve(hold("a", 60))
    await asyncio.to_thread(postgres.restart)
    refused = await again(lambda: store.reserve(hold("b", 41)))
    assert refused is not None and refused.shortfall.reserved == 60, "it kept what it was told"
    await again(lambda: store.settle([settlement("a", 5)]))
    assert [used.amount for used in await again(store.usage)] == [5]
    await store.close()


async def test_a_postgres_that_is_not_there_says_so_without_its_password() -> None:
    pytest.importorskip("asyncpg", reason="the extra `postgres` (asyncpg) is not installed")
    with pytest.raises(StoreError) as raised:
        await PostgresStore("postgresql://cortex:hunter2@127.0.0.1:1/cortex").open()
    assert "hunter2" not in str(raised.value)

"""A reverse proxy as people put before a server: it passes the name on that it was asked for, or asks by an address."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
from aiohttp import web

PUBLIC_NAME = "cortex.example"


@asynccontextmanager
async def proxy_for(upstream: str, *, passes_host: bool) -> AsyncIterator[str]:
    """`proxy_set_header Host $host`, or not. Yields its URL; clients ask it for `PUBLIC_NAME`."""

    async def handle(request: web.Request) -> web.StreamResponse:
        headers = {name: value for name, value in request.headers.items() if name.lower() not in ("host", "connection")}
        headers["x-forwarded-for"], headers["x-forwarded-host"] = "203.0.113.9", request.headers["host"]
        if passes_host:
            headers["host"] = request.headers["host"]
        async with session.request(
            request.method, upstream + request.path_qs, headers=headers, data=await request.read()
        ) as answer:
            response = web.StreamResponse(status=answer.status)
            for name in ("content-type", "access-control-allow-origin"):
                if name in answer.headers:
                    response.headers[name] = answer.headers[name]
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
            return response

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()

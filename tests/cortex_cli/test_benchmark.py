"""What `cortex bench` counts and how, against an endpoint on a real socket."""

from __future__ import annotations

import asyncio
import itertools
import json

import pytest
from aiohttp import web
from cortex_cli import benchmark
from cortex_cli.benchmark import Plan, percentile, spread
from cortex_cli.exits import CliError


def test_percentiles_are_nearest_ranks() -> None:
    values = [float(value) for value in range(1, 101)]
    assert [percentile(values, share) for share in (50, 90, 95, 99, 100)] == [50, 90, 95, 99, 100]
    assert percentile([7.0], 50) == percentile([7.0], 99) == 7.0
    found = spread([3.0, 1.0, 2.0])
    assert found is not None
    assert (found.mean, found.p50, found.max) == (2.0, 2.0, 3.0)
    assert spread([]) is None


def test_prompts_are_seeded_and_share_what_they_are_told_to() -> None:
    plan = Plan("m", prompt_words=30, shared_words=20, seed=3)
    first, second, third = itertools.islice(benchmark.prompts(plan), 3)
    assert len(first.split()) == 30
    assert first.split()[:20] == second.split()[:20] == third.split()[:20]
    assert len({first, second, third}) == 3
    assert next(benchmark.prompts(plan)) == first
    assert next(benchmark.prompts(Plan("m", prompt_words=30, seed=4))) != first


def test_arrivals_follow_the_rate() -> None:
    due = list(benchmark.arrivals(Plan("m", requests=2001, rate=50.0)))
    assert due[0] == 0.0 and due == sorted(due)
    assert due[-1] == pytest.approx(2000 / 50.0, rel=0.1)
    assert list(benchmark.arrivals(Plan("m", requests=3))) == [0.0, 0.0, 0.0]


def event(document: object) -> bytes:
    return b"data: " + json.dumps(document).encode() + b"\n\n"


def delta(**fields: object) -> bytes:
    return event({"choices": [{"index": 0, "delta": fields}]})


USAGE = event({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 4}})
GOOD = [delta(role="assistant", content=""), b": ping\n\n", delta(content="a"), delta(reasoning_content="b"), USAGE]


async def serve(answers: list[list[bytes] | int]) -> tuple[web.AppRunner, str, list[dict[str, object]]]:
    """Each request gets the next answer: writes of a stream, or a status."""
    asked: list[dict[str, object]] = []
    left = iter(answers)

    async def chat(request: web.Request) -> web.StreamResponse:
        asked.append(await request.json())
        answer = next(left)
        if isinstance(answer, int):
            return web.json_response({"error": {"message": "no"}}, status=answer)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for data in answer:
            await response.write(data)
        return response

    app = web.Application()
    app.router.add_post("/v1/chat/completions", chat)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return runner, f"http://127.0.0.1:{runner.addresses[0][1]}", asked


async def test_tokens_are_the_servers_count_and_failures_enter_no_distribution() -> None:
    done = b"data: [DONE]\n\n"
    answers: list[list[bytes] | int] = [
        [*GOOD, done],
        GOOD,
        429,
        [delta(content="a"), event({"error": {"message": "x"}}), done],
        [delta(content="a"), delta(content="b"), delta(content="c"), done],
    ]
    runner, url, asked = await serve(answers)
    try:
        report = await benchmark.run(url, Plan("m", requests=5, concurrency=1, max_tokens=7, seed=1))
    finally:
        await runner.cleanup()
    assert (report.completed, report.failed) == (2, 3)
    assert report.errors == {"stream cut off": 1, "HTTP 429": 1, "error event": 1}
    assert (report.prompt_tokens, report.output_tokens) == (9, 4 + 3)
    assert report.first_token_s is not None and report.gap_s is not None
    assert report.first_token_s.max <= report.latency_s.max if report.latency_s else False
    assert [body["max_tokens"] for body in asked] == [7] * 5
    assert len({json.dumps(body["messages"]) for body in asked}) == 5


async def test_as_many_requests_run_as_concurrency_says_and_no_more() -> None:
    running, at_most = 0, 0
    all_here = asyncio.Event()

    async def chat(request: web.Request) -> web.Response:
        nonlocal running, at_most
        running += 1
        at_most = max(at_most, running)
        if running == 4:
            all_here.set()
        async with asyncio.timeout(20):
            await all_here.wait()
        await asyncio.sleep(0)
        running -= 1
        return web.Response(body=b"".join(GOOD) + b"data: [DONE]\n\n", content_type="text/event-stream")

    app = web.Application()
    app.router.add_post("/v1/chat/completions", chat)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1/"
        report = await benchmark.run(url, Plan("m", requests=12, concurrency=4))
    finally:
        await runner.cleanup()
    assert (report.completed, at_most) == (12, 4)


async def test_an_endpoint_out_of_reach_is_an_error_and_no_report() -> None:
    runner, url, _ = await serve([])
    await runner.cleanup()
    with pytest.raises(CliError) as failed:
        await benchmark.run(url, Plan("m", requests=2))
    assert failed.value.exit_code == 3

"""Load on an OpenAI-compatible endpoint, and how long its answers take: what `cortex bench` runs.

All times are seconds of the client's clock, from the moment a request is sent. The first token is the first chunk with
text, reasoning or a tool call in it; a gap is the time between two such chunks, which is the inter-token latency where
a server sends a chunk per token.
"""

from __future__ import annotations

import asyncio
import math
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import aiohttp
import msgspec
from cortex_core.sse import SseDecoder, SseEvent

from cortex_cli.exits import EXIT_UNREACHABLE, CliError

PERCENTILES = (50, 90, 95, 99)
_TEXT = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend"
)


class Plan(msgspec.Struct, frozen=True):
    """What to send. rate: requests per second, arriving as a Poisson process; None sends as fast as concurrency allows.

    prompt_words: about 1.3 tokens each; shared_words of them are the same in every prompt, so that a prefix cache can
    help.
    """

    model: str
    requests: int = 100
    concurrency: int = 16
    rate: float | None = None
    prompt_words: int = 200
    shared_words: int = 0
    max_tokens: int = 128
    temperature: float | None = 0.0
    ignore_eos: bool = False
    seed: int = 0


class Answer(msgspec.Struct):
    """One request's measurements. error: what went wrong, else None. output_tokens: by the server's count if it gave
    one, else chunks."""

    latency_s: float = 0.0
    first_token_s: float | None = None
    gaps_s: list[float] = []
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None


class Spread(msgspec.Struct, frozen=True):
    """A distribution, in seconds."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


class Report(msgspec.Struct, frozen=True):
    """The outcome of a run. None where nothing was measured."""

    plan: Plan
    endpoint: str
    duration_s: float
    completed: int
    failed: int
    errors: dict[str, int]
    prompt_tokens: int
    output_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    first_token_s: Spread | None
    gap_s: Spread | None
    token_s: Spread | None
    latency_s: Spread | None


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` percent of the sorted values do not exceed (nearest rank)."""
    return ordered[max(math.ceil(share / 100 * len(ordered)) - 1, 0)]


def spread(values: Sequence[float]) -> Spread | None:
    if not values:
        return None
    ordered = sorted(values)
    p50, p90, p95, p99 = (percentile(ordered, share) for share in PERCENTILES)
    return Spread(statistics.fmean(ordered), p50, p90, p95, p99, ordered[-1])


def prompts(plan: Plan) -> Iterator[str]:
    """Seeded prompts without end."""
    rng = random.Random(plan.seed)  # noqa: S311
    words = _TEXT.split()
    shared = " ".join(rng.choice(words) for _ in range(min(plan.shared_words, plan.prompt_words)))
    while True:
        own = " ".join(rng.choice(words) for _ in range(max(plan.prompt_words - plan.shared_words, 1)))
        yield f"{shared} {own}".strip()


def arrivals(plan: Plan) -> Iterator[float]:
    """Seconds from the start at which requests are due."""
    rng = random.Random(plan.seed + 1)  # noqa: S311
    due = 0.0
    for _ in range(plan.requests):
        yield due
        if plan.rate is not None:
            due += rng.expovariate(plan.rate)


async def run(
    endpoint: str, plan: Plan, *, api_key: str | None = None, on_answer: Callable[[Answer], None] = lambda answer: None
) -> Report:
    """Send everything; returns when the last answer is complete. Raises `CliError` if nothing could be reached."""
    url = endpoint.rstrip("/") + ("" if endpoint.rstrip("/").endswith("/v1") else "/v1") + "/chat/completions"
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    seats = asyncio.Semaphore(plan.concurrency)
    answers: list[Answer] = []
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=600)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:
        began = time.perf_counter()

        async def one(prompt: str) -> None:
            try:
                answer = await ask(session, url, plan, prompt)
            finally:
                seats.release()
            answers.append(answer)
            on_answer(answer)

        running: list[Awaitable[None]] = []
        for prompt, due in zip(prompts(plan), arrivals(plan), strict=False):
            wait_s = began + due - time.perf_counter()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            await seats.acquire()
            running.append(asyncio.create_task(one(prompt)))
        await asyncio.gather(*running)
        duration_s = time.perf_counter() - began
    if all(answer.error is not None and answer.error.startswith("no answer") for answer in answers):
        raise CliError(f"no answer from {url}: {answers[0].error}", EXIT_UNREACHABLE)
    return report(endpoint, plan, answers, duration_s)


async def ask(session: aiohttp.ClientSession, url: str, plan: Plan, prompt: str) -> Answer:
    """One streamed request. Never raises for what the server does: it is counted."""
    body: dict[str, object] = {
        "model": plan.model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": plan.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if plan.temperature is not None:
        body["temperature"] = plan.temperature
    if plan.ignore_eos:
        body["ignore_eos"] = True
    answer = Answer()
    decoder = SseDecoder()
    began = last = time.perf_counter()
    num_chunks = 0
    is_complete = False
    try:
        async with session.post(url, json=body) as response:
            if response.status != 200:
                answer.error = f"HTTP {response.status}"
                return answer
            async for data in response.content.iter_any():
                now = time.perf_counter()
                for event in decoder.feed(data):
                    if not isinstance(event, SseEvent):
                        continue
                    if event.data == "[DONE]":
                        is_complete = True
                        continue
                    chunk = _chunk_decoder.decode(event.data)
                    if chunk.error is not None:
                        answer.error = "error event"
                    if chunk.usage is not None:
                        answer.prompt_tokens = chunk.usage.prompt_tokens
                        answer.output_tokens = chunk.usage.completion_tokens
                    if not any(choice.delta.has_tokens for choice in chunk.choices):
                        continue
                    num_chunks += 1
                    if answer.first_token_s is None:
                        answer.first_token_s = now - began
                    else:
                        answer.gaps_s.append(now - last)
                    last = now
    except (aiohttp.ClientConnectorError, TimeoutError) as exc:
        answer.error = f"no answer: {exc}"
    except (aiohttp.ClientError, OSError, msgspec.DecodeError) as exc:
        answer.error = type(exc).__name__
    answer.latency_s = time.perf_counter() - began
    answer.output_tokens = answer.output_tokens or num_chunks
    if answer.error is None and not is_complete:
        answer.error = "stream cut off"
    return answer


def report(endpoint: str, plan: Plan, answers: Sequence[Answer], duration_s: float) -> Report:
    """Failed requests count as failed and enter no distribution."""
    good = [answer for answer in answers if answer.error is None]
    errors: dict[str, int] = {}
    for answer in answers:
        if answer.error is not None:
            errors[answer.error] = errors.get(answer.error, 0) + 1
    output_tokens = sum(answer.output_tokens for answer in good)
    return Report(
        plan=plan,
        endpoint=endpoint,
        duration_s=duration_s,
        completed=len(good),
        failed=len(answers) - len(good),
        errors=errors,
        prompt_tokens=sum(answer.prompt_tokens for answer in good),
        output_tokens=output_tokens,
        requests_per_s=len(good) / duration_s if duration_s else 0.0,
        output_tokens_per_s=output_tokens / duration_s if duration_s else 0.0,
        first_token_s=spread([answer.first_token_s for answer in good if answer.first_token_s is not None]),
        gap_s=spread([gap for answer in good for gap in answer.gaps_s]),
        token_s=spread(
            [
                (answer.latency_s - answer.first_token_s) / (answer.output_tokens - 1)
                for answer in good
                if answer.first_token_s is not None and answer.output_tokens > 1
            ]
        ),
        latency_s=spread([answer.latency_s for answer in good]),
    )


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[msgspec.Raw] | None = None

    @property
    def has_tokens(self) -> bool:
        return bool(self.content or self.reasoning_content or self.reasoning or self.tool_calls)


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: dict[str, Any] | str | None = None


_chunk_decoder = msgspec.json.Decoder(_Chunk)

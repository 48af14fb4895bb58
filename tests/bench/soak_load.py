"""What the soaks share: many clients on raw sockets, and the memory of the processes that serve them.

The resident memory is sampled all along. The first fifth is warm-up: pools fill, logs' rings, caches. Growth is judged
on the rest, as the difference of medians of its first and last tenth and as a fitted line; flat is less than a limit in
both. At the end every gauge of work is 0 again and no descriptor is left over.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import statistics
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

WARM_UP = 0.2
SPARE_DESCRIPTORS = 2
KEY = "sk-soak-soak"
OK = frozenset((200,))


class Ask(NamedTuple):
    """status: what the answer's may be. expected: text that stands in an answer that is not streamed.

    hangs_up: after the first bytes of the answer, or where it is not streamed, after a moment.
    """

    path: str
    body: dict[str, Any]
    status: frozenset[int] = OK
    expected: str = ""
    key: str = KEY
    hangs_up: bool = False


class Load:
    """Many clients at once, until so many requests and events are through. Raises where an answer is not right.

    ask_of: what the request of a number asks. A body without fields is asked with GET.
    """

    def __init__(self, url: str, ask_of: Callable[[int], Ask]) -> None:
        self.host, _, port = url.removeprefix("http://").rpartition(":")
        self.port = int(port)
        self.num_requests = 0
        self.num_events = 0
        self.statuses: Counter[int] = Counter()
        self._numbers = itertools.count()
        self._ask_of = ask_of

    async def run(self, *, requests: int, events: int, clients: int) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(self._client(lambda: self.num_requests < requests or self.num_events < events))

    async def _client(self, goes_on: Callable[[], bool]) -> None:
        connection = await asyncio.open_connection(self.host, self.port)
        while goes_on():
            ask = self._ask_of(next(self._numbers))
            try:
                keeps = await self._exchange(*connection, ask)
            except (OSError, EOFError) as exc:
                raise RuntimeError(f"{ask}: {exc!r}") from exc
            self.num_requests += 1
            if not keeps:
                connection[1].transport.abort()
                connection = await asyncio.open_connection(self.host, self.port)
        connection[1].close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, ask: Ask) -> bool:
        """Whether the connection can go on."""
        body = json.dumps(ask.body).encode() if ask.body else b""
        line = (b"POST " if body else b"GET ") + ask.path.encode()
        writer.write(
            b"%b HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %b\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%b" % (line, ask.key.encode(), len(body), body)
        )
        if ask.hangs_up and not ask.body.get("stream"):
            await asyncio.sleep(0.01)
            return False
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        status = int(head[9:12])
        self.statuses[status] += 1
        if status not in ask.status:
            raise AssertionError(f"{ask}: {head!r} {await reader.read(600)!r}")
        position = head.find(b"content-length: ")
        if position >= 0:
            answer = await reader.readexactly(int(head[position + 16 :].split(b"\r", 1)[0]))
            if ask.expected.encode() not in answer:
                raise AssertionError(f"{ask}: {answer!r}")
        else:
            while size := int(await reader.readline(), 16):
                data = await reader.readexactly(size + 2)
                self.num_events += data.count(b"\n\n")
                if ask.hangs_up:
                    return False
            await reader.readline()
        return b"connection: close" not in head


class Sample(NamedTuple):
    done: float  # share of the work
    rss_mib: float
    descriptors: int


def sample(pid: int, done: float) -> Sample:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return Sample(done, pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(list(Path(f"/proc/{pid}/fd").iterdir())))


def gauges_of(url: str, prefixes: tuple[str, ...]) -> dict[str, float]:
    """The metrics whose lines begin so."""
    found = {}
    with urllib.request.urlopen(url, timeout=10) as answer:
        for line in answer.read().decode().splitlines():
            if line.startswith(prefixes):
                name, _, value = line.rpartition(" ")
                found[name] = float(value)
    return found


class Verdict(NamedTuple):
    growth_mib: float
    fitted_mib: float


def verdict(samples: list[Sample]) -> Verdict:
    """Of the samples after the warm-up."""
    warm = [each for each in samples if each.done >= WARM_UP]
    tenth = max(1, len(warm) // 10)
    first = statistics.median(each.rss_mib for each in warm[:tenth])
    last = statistics.median(each.rss_mib for each in warm[-tenth:])
    slope = statistics.linear_regression([each.done for each in warm], [each.rss_mib for each in warm]).slope
    return Verdict(last - first, slope * (1 - WARM_UP))


async def soak(
    processes: Mapping[str, int],
    load: Load,
    *,
    requests: int,
    events: int,
    clients: int,
    at_work: Callable[[], dict[str, float]],
    max_growth_mib: float = 4.0,
) -> int:
    """Run the load, print what became of each process, and return the exit code.

    processes: pids by name. at_work: gauges that are all 0 when nothing is at work; called in a thread.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in processes}
    idle = {name: sample(pid, 0) for name, pid in processes.items()}
    running = asyncio.ensure_future(load.run(requests=requests, events=events, clients=clients))
    started = time.monotonic()
    said = 0.0
    while not running.done():
        await asyncio.wait({running}, timeout=0.5)
        done = min(load.num_requests / requests, load.num_events / events if events else 1.0, 1.0)
        for name, pid in processes.items():
            samples[name].append(sample(pid, done))
        if done >= said:
            now = ", ".join(f"{name} {of[-1].rss_mib:.1f} MiB" for name, of in samples.items())
            print(f"{100 * done:3.0f} %: {load.num_requests} requests, {load.num_events} events, {now}", flush=True)
            said += 0.1
    await running
    seconds = time.monotonic() - started
    left: dict[str, float] = {}
    with suppress(TimeoutError):
        async with asyncio.timeout(60):  # kept connections close after a while
            while True:
                left = {name: value for name, value in (await asyncio.to_thread(at_work)).items() if value}
                spare = max(sample(pid, 1).descriptors - idle[name].descriptors for name, pid in processes.items())
                if not left and spare <= SPARE_DESCRIPTORS:
                    break
                await asyncio.sleep(0.5)
    print(f"{load.num_requests} requests, {load.num_events} events in {seconds:.0f} s; {dict(load.statuses)}")
    is_good = not left
    for name, pid in processes.items():
        end = sample(pid, 1)
        growth, fitted = verdict(samples[name])
        is_flat = max(growth, fitted) < max_growth_mib
        spare = end.descriptors - idle[name].descriptors
        is_good = is_good and is_flat and spare <= SPARE_DESCRIPTORS
        print(f"{name}: {idle[name].rss_mib:.1f} MiB idle, {end.rss_mib:.1f} MiB at the end")
        print(
            f"{name}: growth after the warm-up {growth:+.2f} MiB, fitted {fitted:+.2f} MiB "
            f"(bar {max_growth_mib} MiB): {'flat' if is_flat else 'GROWS'}"
        )
        is_closed = spare <= SPARE_DESCRIPTORS
        print(f"{name}: descriptors left over {spare} (bar {SPARE_DESCRIPTORS}): {'pass' if is_closed else 'FAIL'}")
    print(f"gauges not at 0: {left or 'none'}: {'FAIL' if left else 'pass'}")
    return 0 if is_good else 1

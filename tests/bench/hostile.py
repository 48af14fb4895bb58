"""What hostile checkpoints and requests cost those who share a neuron with them.

    uv run python tests/bench/hostile.py [--rounds 2] [--out hostile.json]

One real daemon serves the demo model. A process of its own asks for /health fifty times a second, and another one
streams answers from the model, one after the other. Meanwhile, at once and again: every hostile folder of
`tests/hostile/folders.py` is loaded; two models that are set off by a word are asked that word; and the requests of the
cases H1 (a schema that refers to itself forty times), H2 (a stop string of 110,000 characters) and H9 (counting 6 MB,
200,000 messages of one letter, tokenising 30 MB of blanks) come from clients of different names. First the same is
measured without any of it. Printed are the longest /health (the aim is 1 s), the longest silence in an answer, what
became of the attacks, and the peak memory of daemon, text processes, inspections and engines.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp

sys.path.insert(0, str(Path(__file__).parents[2]))  # for a run as a script

from tests.chaos.harness import MODEL, Neuron, running
from tests.hostile.folders import HOSTILE, Hostile, build

CONFIG = 'host = "127.0.0.1"\nport = 0\n[engine]\nkv_cache_tokens = 65536\n'
HEALTH_PER_S = 50.0
AIM_MS = 1_000.0
SET_OFF = ("template loops when asked", "tokenizer backtracks when asked")
PROGRAMS = {
    b"neuron.daemon.text_workers": "text",
    b"neuron.daemon.lifecycle.inspection": "inspections",
    b"neuron.engine.worker": "engines",
}
KINDS = ("daemon", *PROGRAMS.values())
"""The keeper of a daemon counts as daemon."""

LOOK = """
import http.client, json, sys, time
host, port, rate = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
taken = []
print("ready", flush=True)
end = time.monotonic() + float(sys.argv[4])
while time.monotonic() < end:
    began = time.monotonic()
    connection = http.client.HTTPConnection(host, port, timeout=120)
    connection.request("GET", "/health")
    response = connection.getresponse()
    assert response.status == 200, response.status
    response.read()
    connection.close()
    taken.append((time.monotonic() - began) * 1e3)
    time.sleep(max(0.0, 1 / rate - (time.monotonic() - began)))
print(json.dumps(taken), flush=True)
"""

STREAM = """
import http.client, json, sys, time
host, port, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
body = json.dumps({"model": "cortex/demo", "stream": True, "temperature": 0, "max_tokens": 200,
                   "messages": [{"role": "user", "content": "Count from 1 to 40."}]})
texts, firsts, gaps = [], [], []
print("ready", flush=True)
end = time.monotonic() + seconds
while time.monotonic() < end:
    began = last = time.monotonic()
    connection = http.client.HTTPConnection(host, port, timeout=600)
    connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, (response.status, response.read())
    text, first = "", None
    while line := response.readline():
        now = time.monotonic()
        if line.startswith(b"data: {"):
            choices = json.loads(line[6:])["choices"]
            word = choices and choices[0]["delta"].get("content")
            if word:
                if first is None:
                    first = now - began
                else:
                    gaps.append((now - last) * 1e3)
                last, text = now, text + word
    firsts.append(first * 1e3)
    texts.append(text)
print(json.dumps({"texts": texts, "firsts": firsts, "gaps": gaps}), flush=True)
"""


# ---------------------------------------------------------------------- the bystanders


async def bystander(program: str, neuron: Neuron, *arguments: object) -> asyncio.subprocess.Process:
    """A process that has begun to look on, and prints at its end what it saw."""
    host, port = neuron.url.removeprefix("http://").split(":")
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-c", program, host, port, *map(str, arguments)),
        stdout=asyncio.subprocess.PIPE,
        limit=2**26,
    )
    assert process.stdout is not None
    assert (await process.stdout.readline()).strip() == b"ready"
    return process


async def seen(process: asyncio.subprocess.Process) -> Any:
    assert process.stdout is not None
    data = await process.stdout.read()
    assert await process.wait() == 0
    return json.loads(data)


# ---------------------------------------------------------------------- the attacks


def requests_of_clients() -> list[tuple[str, str, bytes]]:
    """(case, path, body) of each."""
    loop = {"anyOf": [{"$ref": "#"}] * 40}
    tool = {"type": "function", "function": {"name": "f", "parameters": loop}}
    hi = [{"role": "user", "content": "hi"}]
    words = "the quick brown fox jumps over the lazy dog and counts " * 110_000
    letters = [{"role": "user" if index % 2 == 0 else "assistant", "content": "a"} for index in range(200_000)]

    def body(**fields: Any) -> bytes:
        return json.dumps({"model": MODEL, **fields}).encode()

    chat, count = "/v1/chat/completions", "/v1/messages/count_tokens"
    return [
        *[("H1", chat, body(messages=hi, tools=[tool], tool_choice="required", max_tokens=8))] * 2,
        ("H2", chat, body(messages=hi, stop="x" * 110_000, max_tokens=8)),
        *[("H9 6 MB", count, body(messages=[{"role": "user", "content": words}]))] * 5,
        ("H9 messages", count, body(messages=letters)),
        ("H15 blanks", "/tokenize", body(prompt=" " * 30_000_000)),
    ]


class Attack:
    """Everything at once, and what became of it: (case, status, code) and how often."""

    def __init__(self, neuron: Neuron, folders: dict[str, Path], set_off: dict[str, str]) -> None:
        self.outcomes: Counter[tuple[str, int, str]] = Counter()
        self._neuron = neuron
        self._folders = folders
        self._set_off = set_off
        self._requests = requests_of_clients()

    async def round(self) -> None:
        jobs: list[Awaitable[None]] = [
            self._send("folders", "/models/load", json.dumps({"model_id": f"file:{folder}"}).encode())
            for folder in self._folders.values()
        ]
        for model, word in self._set_off.items():
            chat = {"model": model, "messages": [{"role": "user", "content": word}], "max_tokens": 8}
            jobs += [self._send("H8", "/v1/chat/completions", json.dumps(chat).encode()) for _ in range(3)]
        jobs += [self._send(*request, principal=f"client-{index}") for index, request in enumerate(self._requests)]
        await asyncio.gather(*jobs)

    async def _send(self, case: str, path: str, body: bytes, principal: str = "") -> None:
        headers = {"content-type": "application/json"}
        if principal:
            headers["x-cortex-principal"] = principal
        try:
            async with self._neuron.client.post(self._neuron.url + path, data=body, headers=headers) as response:
                answer = json.loads(await response.read())
                error = answer.get("error") if isinstance(answer, dict) else None
                self.outcomes[case, response.status, str((error or {}).get("code") or "-")] += 1
        except (aiohttp.ClientError, OSError) as exc:
            self.outcomes[case, 0, type(exc).__name__] += 1


# ---------------------------------------------------------------------- memory


class Memory:
    """Of each kind of process, in MiB: the largest sum that was seen at one time (by PSS, which counts what is shared
    once), and the most that one process ever held, by the kernel's own record."""

    def __init__(self, pid: int) -> None:
        self.peak = dict.fromkeys(KINDS, 0.0)
        self.largest = dict.fromkeys(KINDS, 0.0)
        self._pid = pid

    async def watch(self) -> None:
        while True:
            now = await asyncio.to_thread(self._look)
            for kind, amount in now.items():
                self.peak[kind] = max(self.peak[kind], amount)
            await asyncio.sleep(0.1)

    def _look(self) -> dict[str, float]:
        found = dict.fromkeys(KINDS, 0.0)
        for pid in family_of(self._pid):
            kind = self._kind_of(pid)
            found[kind] += mib_of(pid, "smaps_rollup", "Pss:")
            self.largest[kind] = max(self.largest[kind], mib_of(pid, "status", "VmHWM:"))
        return found

    def _kind_of(self, pid: int) -> str:
        try:
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return "daemon"
        return next((kind for word, kind in PROGRAMS.items() if word in arguments), "daemon")


def family_of(pid: int) -> list[int]:
    """The process and all that descend from it."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    family = [pid]
    for member in family:
        family += parents.get(member, [])
    return family


def mib_of(pid: int, file: str, key: str) -> float:
    try:
        for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return 0.0


# ---------------------------------------------------------------------- the run


def percentile(values: Iterable[float], share: float) -> float:
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(len(ranked) * share))]


def row(name: str, health: list[float], stream: dict[str, Any]) -> str:
    gaps = stream["gaps"] or [0.0]
    return (
        f"{name:<10}{len(health):>7}{percentile(health, 0.5):>8.1f}{percentile(health, 0.99):>9.1f}{max(health):>9.1f}"
        f"{len(stream['texts']):>9}{percentile(gaps, 0.99):>9.1f}{max(gaps):>9.1f}{max(stream['firsts']):>11.1f}"
    )


async def measured(neuron: Neuron, seconds: float, work: Awaitable[Any]) -> tuple[list[float], dict[str, Any]]:
    """The two bystanders while `work` goes on, for as long as that takes."""
    looking = await bystander(LOOK, neuron, HEALTH_PER_S, seconds)
    streaming = await bystander(STREAM, neuron, seconds)
    reports = asyncio.gather(seen(looking), seen(streaming))
    await work
    health, stream = await reports
    return health, stream


async def run(rounds: int, seconds: float, out: Path | None) -> int:
    refused = [hostile for hostile in HOSTILE if hostile.refused is not None]
    with tempfile.TemporaryDirectory() as scratch:
        folders = {hostile.name: build(hostile, Path(scratch)) for hostile in refused}
        set_off: dict[str, Hostile] = {hostile.name: hostile for hostile in HOSTILE if hostile.name in SET_OFF}
        async with running(Path(scratch) / "neuron", config=CONFIG) as neuron:
            await neuron.load(max_model_len=8192)
            words: dict[str, str] = {}
            for hostile in set_off.values():
                model = f"file:{build(hostile, Path(scratch))}"
                await neuron.load(model, max_model_len=2048)
                words[model] = hostile.asked or ""
            memory = Memory(neuron.pid)
            watching = asyncio.create_task(memory.watch())
            print(
                f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}, "
                f"torch {version('torch')}; {len(folders)} folders, {rounds} rounds; milliseconds"
            )
            print(f"{'':<10}{'/health':>33}{'answers':>9}{'gap between words':>18}{'first word':>11}")
            print(
                f"{'':<10}{'looks':>7}{'p50':>8}{'p99':>9}{'longest':>9}{'':>9}{'p99':>9}{'longest':>9}{'longest':>11}"
            )
            quiet = await measured(neuron, seconds, asyncio.sleep(0))
            print(row("quiet", *quiet), flush=True)
            before = dict(memory.peak)
            attack = Attack(neuron, folders, words)

            async def attacked() -> float:
                began = time.monotonic()
                for _ in range(rounds):
                    await attack.round()
                return time.monotonic() - began

            took = asyncio.ensure_future(attacked())
            health: list[float] = []
            stream: dict[str, Any] = {"texts": [], "firsts": [], "gaps": []}
            while not took.done():
                more_health, more = await measured(neuron, seconds, asyncio.sleep(0))
                health += more_health
                for key, values in more.items():
                    stream[key] += values
            print(row("attacked", health, stream), flush=True)
            watching.cancel()
            wrong = [text for text in stream["texts"] if text != quiet[1]["texts"][0]]
            print(f"\n{len(wrong)} of {len(stream['texts'])} answers differ; the attack took {took.result():.0f} s")
            print("peak MiB (quiet → attacked): ", end="")
            print(", ".join(f"{kind} {before[kind]:.0f} → {memory.peak[kind]:.0f}" for kind in KINDS))
            print("peak MiB of one process: ", end="")
            print(", ".join(f"{kind} {memory.largest[kind]:.0f}" for kind in KINDS))
            for (case, status, code), count in sorted(attack.outcomes.items()):
                print(f"    {case:<12} {status} {code:<24} {count}")
            is_good = not wrong and max(health) <= AIM_MS
            print(f"longest /health {max(health):.0f} ms, the aim is {AIM_MS:.0f} ms: {'ok' if is_good else 'OVER'}")
            if out is not None:
                figures = {"health_ms": health, "stream": stream, "peak_mib": memory.peak, "quiet": quiet[0]}
                out.write_text(json.dumps(figures))
            return 0 if is_good else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="how often everything is sent at once")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each look; attacks last as long as they last")
    parser.add_argument("--out", type=Path, help="all figures, as JSON")
    options = parser.parse_args()
    return asyncio.run(run(options.rounds, options.seconds, options.out))


if __name__ == "__main__":
    sys.exit(main())

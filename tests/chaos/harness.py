"""A neuron as a real process that tests may break, its HTTP interface as a client sees it, and what it leaves behind.

Every answer that a fault has touched is compared with the one that the same request gets when nothing happens. A test
kills, stops and poisons through signals or through the debug levers of a load
(`neuron.engine.loading.fault_injection`); nothing inside the daemon is replaced.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from cortex_core.sse import SseComment, SseDecoder, SseEvent

MODEL = "cortex/demo"
CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
PATHS = (CHAT, MESSAGES)

CONFIG = """
host = "127.0.0.1"
port = 0
[engine]
num_threads = 1
kv_cache_tokens = 65536
[server]
stream_hold_s = 0.1
ping_interval_s = 0.2
watchdog_s = 0
"""
"""Small, and quick to say that it is alive. Without a keeper: what is broken here is the process that was started."""

PATIENCE_S = 300.0
"""The longest wait for anything: the machine may be busy, and nothing here is a measurement."""


@dataclass
class Answer:
    """What one client got. error: of the envelope or of the stream's last event; status 200 is a whole answer."""

    status: int
    text: str = ""
    finish: str | None = None
    error: dict[str, Any] | None = None
    num_pings: int = 0
    usage: dict[str, Any] = field(default_factory=dict)

    @property
    def said(self) -> tuple[str, str | None]:
        """What must not depend on any fault."""
        return self.text, self.finish


@dataclass
class Belongings:
    """What a daemon holds that could leak."""

    fds: int
    children: int
    in_flight: int
    queued: int


class Neuron:
    """`neuron serve --debug-levers` in a process of its own, and a client of it."""

    def __init__(
        self, process: asyncio.subprocess.Process, url: str, folder: Path, client: aiohttp.ClientSession
    ) -> None:
        self.process = process
        self.url = url
        self.folder = folder
        self.client = client

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        """All that it has written to stderr, engines included."""
        return (self.folder / "neuron.log").read_text(errors="replace")

    # ------------------------------------------------------------------ asking

    async def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body)
        async with self.client.request(method, self.url + path, data=data) as response:
            text = await response.text()
            is_json = response.content_type == "application/json"
            return response.status, json.loads(text) if is_json else text

    async def get(self, path: str) -> Any:
        status, answer = await self.call("GET", path)
        assert status == 200, (path, status, answer)
        return answer

    async def load(self, model: str = MODEL, *levers: dict[str, Any], **spec: Any) -> None:
        """Returns when the model is loaded; levers are those of `neuron.engine.loading.fault_injection`."""
        body = {"model_id": model, **spec, **({"debug": {"levers": levers}} if levers else {})}
        status, answer = await self.call("POST", "/models/load", body)
        assert status == 200, (answer, self.log[-3000:])

    async def unload(self, model: str = MODEL) -> None:
        status, answer = await self.call("POST", "/models/unload", {"model_id": model})
        assert status == 200, answer

    async def model(self, model: str = MODEL) -> dict[str, Any]:
        """Its entry of /models; empty if there is none."""
        return next((entry for entry in await self.get("/models") if entry["id"] == model), {})

    async def health(self, model: str = MODEL) -> dict[str, Any]:
        """Its entry of /health; empty if there is none."""
        return next((entry for entry in (await self.get("/health"))["models"] if entry["id"] == model), {})

    async def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        return sum(
            float(line.rpartition(" ")[2])
            for line in (await self.get("/metrics")).splitlines()
            if re.match(rf"{name}(_total)?[{{ ]", line) and all(label in line for label in wanted)
        )

    async def ask(
        self,
        request: dict[str, Any],
        *,
        path: str = CHAT,
        stream: bool = True,
        on_text: Callable[[str], None] = lambda text: None,
    ) -> Answer:
        """One request to its end. on_text gets the text so far, whenever there is more."""
        body = {"model": MODEL, "max_tokens": 100, **request, "stream": stream}
        async with self.client.post(self.url + path, data=json.dumps(body)) as response:
            if not stream or response.status != 200:
                answer = json.loads(await response.read())
                if response.status != 200:
                    return Answer(response.status, error=answer["error"])
                return _whole(path, answer)
            return await _streamed(path, response, on_text)

    # ------------------------------------------------------------------ looking

    def engine_pids(self) -> dict[int, int]:
        """Process id of each rank of the engine groups of this daemon."""
        found: dict[int, int] = {}
        for pid in _children_of(self.pid):
            arguments = _arguments_of(pid)
            if "neuron.engine.worker" in arguments:
                found[int(arguments[arguments.index("--rank") + 1])] = pid
        return found

    def engine_pid_set(self) -> set[int]:
        """Process ids of the ranks of all engine groups."""
        return {pid for pid in _children_of(self.pid) if "neuron.engine.worker" in _arguments_of(pid)}

    async def belongings(self) -> Belongings:
        """Counted while nothing is going on."""
        health = await self.get("/health")
        return Belongings(
            fds=len(os.listdir(f"/proc/{self.pid}/fd")),  # noqa: PTH208
            children=len(_children_of(self.pid)),
            in_flight=sum(model["in_flight"] for model in health["models"]),
            queued=sum(model["queue_depth"] for model in health["models"]),
        )

    async def leaves_nothing_behind(self, before: Belongings) -> None:
        """Wait until the daemon holds no more than before: processes, descriptors, seats."""
        now = before

        async def is_clean() -> bool:
            nonlocal now
            now = await self.belongings()
            is_idle = now.in_flight == now.queued == 0
            return is_idle and now.fds <= before.fds and now.children <= before.children

        await eventually(is_clean, lambda: f"{before} became {now}: {_describe_fds(self.pid)[:60]}")

    async def holds_no_pages(self, model: str = MODEL) -> None:
        """Wait until every KV page of a loaded model is free, as its engine itself says."""

        async def is_free() -> bool:
            free, total = [await self.metric(f"neuron_kv_{name}", model=model) for name in ("free_pages", "pages")]
            running = await self.metric("neuron_engine_running", model=model)
            waiting = await self.metric("neuron_engine_waiting", model=model)
            return (running, waiting) == (0, 0) and (total == 0 or free == total)

        await eventually(is_free, lambda: "pages are held although nothing runs")

    # ------------------------------------------------------------------ breaking

    def kill_rank(self, rank: int = 0) -> None:
        os.kill(self.engine_pids()[rank], signal.SIGKILL)

    def stop_rank(self, rank: int = 0) -> None:
        os.kill(self.engine_pids()[rank], signal.SIGSTOP)


# ---------------------------------------------------------------------- life


@asynccontextmanager
async def running(
    folder: Path, *, config: str = CONFIG, arguments: Iterable[str] = (), environ: dict[str, str] | None = None
) -> AsyncIterator[Neuron]:
    """A daemon over `folder` (configuration, log); stopped at the end, when it must leave no process behind."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "neuron.toml").write_text(config)
    with (folder / "neuron.log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "neuron", "serve", "--debug-levers", "--config", str(folder / "neuron.toml"), *arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | (environ or {}),
        )
    assert process.stdout is not None
    line = (await asyncio.wait_for(process.stdout.readline(), PATIENCE_S)).decode()
    url = line.rpartition(" ")[2].strip()
    assert url.startswith("http://"), (line, (folder / "neuron.log").read_text())
    neuron = Neuron(process, url, folder, _new_client())
    try:
        yield neuron
    finally:
        await neuron.client.close()
        await end(process)


async def end(process: asyncio.subprocess.Process) -> None:
    """SIGTERM twice (do not wait for streams); what it started must be gone with it."""
    if process.returncode is not None:
        return
    children = _children_of(process.pid)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
    try:
        await asyncio.wait_for(process.wait(), PATIENCE_S)
    except TimeoutError:
        process.kill()
        raise
    assert process.returncode == 0
    left = [pid for pid in children if Path(f"/proc/{pid}").exists()]
    assert not left, f"left behind: {[' '.join(_arguments_of(pid)) for pid in left]}"


def _new_client() -> aiohttp.ClientSession:
    # A connection for each request: the server keeps one that its client has closed until its keep-alive time is over.
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=PATIENCE_S),
        headers={"content-type": "application/json"},
    )


async def eventually(condition: Callable[[], Any], what: Callable[[], str] = lambda: "") -> None:
    """Wait for the state of another process, which has no event to wait on. `condition` may be a coroutine function."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + PATIENCE_S
    while True:
        met = condition()
        if asyncio.iscoroutine(met):
            met = await met
        if met:
            return
        assert loop.time() < deadline, f"not within {PATIENCE_S:.0f} s: {what()}"
        await asyncio.sleep(0.05)


# ---------------------------------------------------------------------- answers


def _whole(path: str, body: dict[str, Any]) -> Answer:
    if path == MESSAGES:
        text = "".join(part.get("text", "") for part in body["content"])
        return Answer(200, text, body["stop_reason"], usage=body["usage"])
    (choice,) = body["choices"]
    return Answer(200, choice["message"]["content"] or "", choice["finish_reason"], usage=body["usage"])


async def _streamed(path: str, response: aiohttp.ClientResponse, on_text: Callable[[str], None]) -> Answer:
    answer, decoder = Answer(200), SseDecoder(with_comments=True)
    is_complete = False
    async for data in response.content.iter_any():
        before = len(answer.text)
        for item in decoder.feed(data):
            if isinstance(item, SseComment):
                answer.num_pings += "ping" in item.text
            elif isinstance(item, SseEvent):
                is_complete |= _take(path, item, answer)
        if len(answer.text) > before:
            on_text(answer.text)
    assert is_complete or answer.error is not None, f"the stream broke off after {answer.text[-200:]!r}"
    return answer


def _take(path: str, event: SseEvent, answer: Answer) -> bool:
    """Returns whether it was the last event of a whole answer."""
    if event.data == "[DONE]":
        return True
    data = json.loads(event.data)
    if "error" in data:
        answer.error = data["error"]
    elif path == MESSAGES:
        answer.num_pings += data["type"] == "ping"
        if data["type"] == "content_block_delta":
            answer.text += data["delta"].get("text", "")
        elif data["type"] == "message_delta":
            answer.finish, answer.usage = data["delta"]["stop_reason"], data["usage"]
        return bool(data["type"] == "message_stop")
    else:
        for choice in data["choices"]:
            answer.text += choice["delta"].get("content") or ""
            answer.finish = choice["finish_reason"] or answer.finish
    return False


# ---------------------------------------------------------------------- /proc


def _children_of(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == parent and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def _arguments_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def _describe_fds(pid: int) -> list[str]:
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(str(entry.readlink()))
        except OSError:
            continue
    return sorted(found)


class Undisturbed:
    """The answers that requests get when nothing happens to their engine."""

    def __init__(self) -> None:
        self._known: dict[str, Answer] = {}

    async def answers(self, neuron: Neuron, requests: Iterable[dict[str, Any]], **spec: Any) -> list[Answer]:
        """Each asked once in a module; loads the model for that, and unloads it."""
        wanted = {json.dumps([request, spec], sort_keys=True): request for request in requests}
        missing = {key: request for key, request in wanted.items() if key not in self._known}
        if missing:
            await neuron.load(**spec)
            answers = await asyncio.gather(*map(neuron.ask, missing.values()))
            for key, answer in zip(missing, answers, strict=True):
                assert answer.status == 200 and answer.error is None and answer.text, answer
                self._known[key] = answer
            await neuron.unload()
        return [self._known[key] for key in wanted]

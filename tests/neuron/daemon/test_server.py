"""How the daemon starts and ends: in this process with scripted engines, and as the real command."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from neuron.daemon.common.config import NeuronConfig, ServerSection
from neuron.daemon.server import Daemon

from tests.neuron.daemon.api.harness import RunningNeuron, make_checkpoint, run_neuron
from tests.neuron.scripted_engine import eventually
from tests.neuron.scripted_worker import HOLD

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "checkpoint")


async def open_stream(neuron: RunningNeuron) -> tuple[asyncio.Task[bytes], int]:
    """A stream that has begun and will not end by itself, and the pid of its engine."""
    first = asyncio.Event()

    async def read() -> bytes:
        body = b""
        request = json.dumps(neuron.chat(stream=True, top_k=HOLD, max_tokens=50))
        async with neuron.client.post(neuron.url + CHAT, data=request) as response:
            async for chunk, _ in response.content.iter_chunks():
                body += chunk
                first.set()
        return body

    reading = asyncio.create_task(read())
    await first.wait()
    (pid,) = neuron.served.group.pids
    return reading, pid


async def test_a_drain_refuses_new_work_and_lets_streams_end(checkpoint: Path) -> None:
    async with run_neuron(checkpoint) as neuron:
        reading, pid = await open_stream(neuron)
        neuron.daemon.request_stop()
        await eventually(lambda: neuron.daemon.services.is_draining)
        status, headers, body = await neuron.post(CHAT, neuron.chat())
        assert status == 503 and headers["retry-after"] == "15"
        assert json.loads(body)["error"]["code"] == "shutting_down"
        assert (await neuron.get("/health"))["draining"] is True
        status, _, body = await neuron.post("/models/load", {"model_id": neuron.model})
        assert status == 503
        assert not reading.done()
        neuron.daemon.request_stop()  # a second signal: no more patience
        rest = await reading
    last = [line for line in rest.decode().splitlines() if line.startswith("data: ")][-1]
    assert json.loads(last[6:])["error"]["code"] == "shutting_down" and "[DONE]" not in rest.decode()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_streams_that_outlast_the_grace_time_end_with_an_error_event(checkpoint: Path) -> None:
    async with run_neuron(checkpoint, drain_grace_s=0.1) as neuron:
        reading, _ = await open_stream(neuron)
        neuron.daemon.request_stop()
        assert b"shutting_down" in await reading


async def test_F32_who_waits_in_the_queue_is_told_at_once(checkpoint: Path) -> None:
    async with run_neuron(checkpoint) as neuron:
        neuron.served.admission.max_in_flight = 1
        reading, _ = await open_stream(neuron)
        waiting = asyncio.create_task(neuron.post(CHAT, neuron.chat()))
        await eventually(lambda: neuron.served.admission.queue_depth == 1)
        neuron.daemon.request_stop()
        status, _, body = await waiting
        assert status == 503 and json.loads(body)["error"]["code"] == "shutting_down"
        neuron.daemon.request_stop()
        await reading


async def test_nothing_is_left_on_disk(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
    async with run_neuron(checkpoint):
        (folder,) = tmp_path.iterdir()
        assert folder.stat().st_mode & 0o777 == 0o700
    assert list(tmp_path.iterdir()) == []


async def test_what_a_killed_daemon_left_is_removed_and_a_living_one_is_left_alone(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
    dead = tmp_path / "neuron-dead"
    dead.mkdir()
    (dead / "lock").touch()
    (dead / "x.sock").touch()
    (tmp_path / "neuron-other").mkdir()  # not ours to judge: it has no lock
    async with run_neuron(checkpoint, load=False):
        (first,) = set(tmp_path.iterdir()) - {tmp_path / "neuron-other"}
        assert first != dead
        async with run_neuron(checkpoint, load=False):
            assert first.is_dir() and len(list(tmp_path.iterdir())) == 3
    assert list(tmp_path.iterdir()) == [tmp_path / "neuron-other"]


def test_a_taken_port_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        done = subprocess.run(
            [sys.executable, "-m", "neuron", "serve", "--host", "127.0.0.1", "-p", str(other.getsockname()[1])],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=tmp_path,
        )
    assert done.returncode == 1 and "cannot listen" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "number"), [(["serve", "--port", "0"], signal.SIGTERM), (["--port", "0"], signal.SIGINT)]
)
def test_a_signal_ends_the_real_daemon_with_0(tmp_path: Path, arguments: list[str], number: int) -> None:
    with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(f"{short}/notify")
        systemd.settimeout(60)
        with subprocess.Popen(
            [sys.executable, "-m", "neuron", *arguments, "--host", "127.0.0.1"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "NOTIFY_SOCKET": f"{short}/notify"},
        ) as process:
            assert process.stdout is not None
            ready = process.stdout.readline()
            match = re.fullmatch(r"neuron listening on http://127\.0\.0\.1:(\d+)\n", ready)
            assert match, ready
            with socket.create_connection(("127.0.0.1", int(match[1])), timeout=60) as connection:
                connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
                assert connection.makefile("rb").readline() == b"HTTP/1.1 200 \r\n"
            assert systemd.recv(100) == b"READY=1"
            process.send_signal(number)
            assert process.wait(60) == 0
            assert systemd.recv(100) == b"STOPPING=1"
            assert process.stderr is not None and "Traceback" not in process.stderr.read()


async def test_the_listener_takes_connections_before_the_daemon_serves() -> None:
    import msgspec

    daemon = Daemon(msgspec.structs.replace(NeuronConfig(), host="127.0.0.1", port=0))
    url = daemon.bind()
    _, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
    writer.close()
    daemon.request_stop()
    await daemon.serve()


async def test_stopping_during_an_unload_leaves_no_process(checkpoint: Path) -> None:
    async with run_neuron(checkpoint) as neuron:
        (pid,) = neuron.served.group.pids
        os.kill(pid, signal.SIGSTOP)  # it will not heed the request to end
        unloading = asyncio.create_task(neuron.daemon.services.manager.unload(neuron.model))
        await eventually(lambda: neuron.served.stopping is not None)
        await neuron.daemon.services.manager.shutdown(timeout_s=60)
        await unloading
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_a_connection_that_its_client_closed_is_given_up_at_once(checkpoint: Path) -> None:
    async with run_neuron(checkpoint) as neuron:
        fds = Path("/proc/self/fd")
        before = len(list(fds.iterdir()))
        address = urlsplit(neuron.url)
        for _ in range(20):
            reader, writer = await asyncio.open_connection(address.hostname, address.port)
            writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            writer.close()
            await writer.wait_closed()
        async with asyncio.timeout(20):
            while len(list(fds.iterdir())) > before + 2:
                await asyncio.sleep(0.05)  # the kernel tells nobody when another socket is closed


async def test_O2_a_client_that_reads_nothing_of_its_answers_is_cut_off() -> None:
    """Not only of streams: whoever asks for the same document over and over and takes none of it holds a connection."""
    config = NeuronConfig(host="127.0.0.1", port=0, state_dir="", server=ServerSection(write_timeout_s=1.0))
    daemon = Daemon(config)
    address = urlsplit(daemon.bind())
    serving = asyncio.create_task(daemon.serve())
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.setblocking(False)
        await asyncio.get_running_loop().sock_connect(deaf, (address.hostname, address.port))
        await asyncio.get_running_loop().sock_sendall(
            deaf, b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n" * 300
        )
        await eventually(lambda: daemon._connections.num_open == 1)
        await eventually(lambda: daemon._connections.num_open == 0)
    daemon.request_stop()
    await serving


IMPORTED = """
import asyncio, http.client, sys
from neuron.daemon.common.config import NeuronConfig
from neuron.daemon.server import Daemon

def ask(url):
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    connection.request("GET", "/health")
    return connection.getresponse().status

async def main():
    daemon = Daemon(NeuronConfig(host="127.0.0.1", port=0, state_dir=""))
    url = daemon.bind()
    before = set(sys.modules)
    serving = asyncio.create_task(daemon.serve())
    assert await asyncio.to_thread(ask, url) == 200
    print(*sorted(set(sys.modules) - before))
    daemon.request_stop()
    await serving

asyncio.run(main())
"""


def test_O2_once_it_listens_nothing_is_imported_before_it_answers() -> None:
    """Whoever connects meanwhile waits for as long: seconds where the processor is busy."""
    ended = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, timeout=120)
    assert (ended.stdout.split(), ended.returncode) == ([], 0), ended.stderr

"""The real daemons, their event loop blocked on purpose: who watches them notices, and they serve again."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.fleet_process import MODEL, call, eventually

PROGRAM = Path(__file__).with_name("stuck_daemon.py")
PATIENCE_S = 120.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def engines_of(pid: int) -> list[int]:
    return [
        child for child in children_of(pid) if b"neuron.engine.worker" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


class Daemon:
    def __init__(self, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
        self.process = process
        self.url = url
        self.log_path = log

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    @property
    def pid(self) -> int:
        """The keeper's child."""
        (pid,) = children_of(self.process.pid)
        return pid

    def get(self, path: str) -> Any:
        status, _, body = call(self.url, "GET", path, timeout=30)
        assert status == 200, body
        return json.loads(body)

    def serves(self) -> bool:
        assert self.process.poll() is None, self.log
        return bool(self.get("/health"))


@contextmanager
def running(
    kind: str, folder: Path, *, watchdog_s: float = 3, more: str = "", environ: dict[str, str] | None = None
) -> Iterator[Daemon]:
    port, config, log = free_port(), folder / f"{kind}.toml", folder / f"{kind}.log"
    if kind == "cortex":
        config.write_text(
            f'[gateway]\nlisten = "127.0.0.1:{port}"\nmetrics_listen = "127.0.0.1:0"\nwatchdog_s = {watchdog_s}\n{more}'
        )
    else:
        config.write_text(
            f'host = "127.0.0.1"\nport = {port}\nstate_dir = ""\n{more}[server]\nwatchdog_s = {watchdog_s}\n'
            "[engine]\nnum_threads = 1\nkv_cache_tokens = 8192\n"
        )
    command = [sys.executable, str(PROGRAM), kind, "serve", "--config", str(config)]
    if environ is not None:  # as systemd tells a process of its watchdog
        own = "import os, sys; os.environ['WATCHDOG_PID'] = str(os.getpid()); os.execv(sys.argv[1], sys.argv[1:])"
        command = [sys.executable, "-c", own, *command]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **(environ or {})},
        )
    daemon = Daemon(process, f"http://127.0.0.1:{port}", log)
    try:
        eventually(daemon.serves, within_s=PATIENCE_S, what=f"the {kind} serves")
        yield daemon
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


def test_H8_watchdog_a_gateway_that_hangs_is_killed_and_serves_again(tmp_path: Path) -> None:
    with running("cortex", tmp_path) as daemon:
        first = daemon.pid
        daemon.process.send_signal(signal.SIGUSR2)
        eventually(lambda: "has been silent for" in daemon.log, within_s=PATIENCE_S, what="the silence is noticed")
        eventually(lambda: children_of(daemon.process.pid) not in ([], [first]), within_s=PATIENCE_S, what="another")
        eventually(daemon.serves, within_s=PATIENCE_S, what="it serves again")
        was_kept("cortex", daemon)


def was_kept(kind: str, daemon: Daemon) -> None:
    assert "in blocked_for_ever" in daemon.log, "the stacks say where"
    assert f"{kind}.keeper: " in daemon.log
    resident = Path(f"/proc/{daemon.process.pid}/status").read_text().split("VmRSS:")[1].split()[0]
    assert int(resident) < 20_000, "the keeper is small"
    daemon.process.terminate()
    assert daemon.process.wait(60) == 0


def test_H8_watchdog_a_neuron_that_hangs_is_killed_with_its_engines_and_its_models_come_back(tmp_path: Path) -> None:
    model = f'[[default_models]]\nmodel_id = "{MODEL}"\n'
    with running("neuron", tmp_path, more=model) as daemon:

        def is_loaded() -> bool:
            return bool([entry for entry in daemon.get("/models") if entry["status"] == "loaded"])

        eventually(is_loaded, within_s=PATIENCE_S, what="the model is loaded")
        (engine,) = engines_of(daemon.pid)
        limits = Path(f"/proc/{engine}/limits").read_text().split("Max open files")[1].split()
        assert limits[0] == limits[1], "an engine may have as many descriptors as its daemon"
        daemon.process.send_signal(signal.SIGUSR2)
        eventually(lambda: not Path(f"/proc/{engine}").exists(), within_s=PATIENCE_S, what="the engine is gone")
        eventually(daemon.serves, within_s=PATIENCE_S, what="another neuron serves")
        eventually(is_loaded, within_s=PATIENCE_S, what="with its model")
        body = {"model": MODEL, "max_tokens": 3, "messages": [{"role": "user", "content": "hi"}]}
        status, _, answer = call(daemon.url, "POST", "/v1/chat/completions", body)
        assert status == 200, answer
        was_kept("neuron", daemon)


@pytest.mark.parametrize("kind", ["cortex", pytest.param("neuron", marks=pytest.mark.full)])
def test_H8_watchdog_without_a_limit_nobody_keeps_it(tmp_path: Path, kind: str) -> None:
    with running(kind, tmp_path, watchdog_s=0) as daemon:
        assert b"keeper" not in Path(f"/proc/{daemon.process.pid}/cmdline").read_bytes()
        environ = Path(f"/proc/{daemon.process.pid}/environ").read_bytes()
        assert b"CORTEX_KEEPER" not in environ


@pytest.mark.parametrize("kind", ["cortex", "neuron"])
def test_H8_watchdog_systemd_hears_of_start_life_reload_and_end(tmp_path: Path, kind: str) -> None:
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(f"{folder}/notify")
        systemd.settimeout(PATIENCE_S)
        environ = {"NOTIFY_SOCKET": f"{folder}/notify", "WATCHDOG_USEC": "400000"}
        with running(kind, tmp_path, environ=environ) as daemon:
            assert not [pid for pid in children_of(daemon.process.pid) if b"keeper" in cmdline(pid)]
            assert systemd.recv(200) == b"READY=1", "after it listened and before anything else"
            assert [systemd.recv(200) for _ in range(3)] == [b"WATCHDOG=1"] * 3
            if kind == "cortex":
                daemon.process.send_signal(signal.SIGHUP)
                reloading, _, since = next_word(systemd).partition(b"\n")
                assert reloading == b"RELOADING=1" and since.startswith(b"MONOTONIC_USEC=")
                assert abs(time.monotonic_ns() // 1000 - int(since[15:])) < 60_000_000
                assert next_word(systemd) == b"READY=1"
            daemon.process.send_signal(signal.SIGUSR2)
            systemd.settimeout(0.7)
            with pytest.raises(TimeoutError):
                while True:  # what was under way; then nothing, as its loop is blocked
                    assert systemd.recv(200) == b"WATCHDOG=1"
            daemon.process.send_signal(signal.SIGABRT)  # WatchdogSignal
            assert daemon.process.wait(60) == -signal.SIGABRT
            assert "in blocked_for_ever" in daemon.log
        systemd.settimeout(PATIENCE_S)
        with running(kind, tmp_path, environ=environ) as daemon:
            assert systemd.recv(200) == b"READY=1"
            daemon.process.terminate()
            assert next_word(systemd) == b"STOPPING=1"
            assert daemon.process.wait(60) == 0


def cmdline(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def next_word(systemd: socket.socket) -> bytes:
    while (word := systemd.recv(200)) == b"WATCHDOG=1":
        continue
    return word

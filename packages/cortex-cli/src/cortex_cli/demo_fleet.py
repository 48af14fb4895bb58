"""A fleet of one on loopback: a neuron and a gateway as real child processes."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from cortex_cli.exits import CliError
from cortex_cli.gateway import Gateway

_READY = re.compile(r"listening on (http://[\w.\-:\[\]]+)")
_METRICS = re.compile(r"metrics exporter on (http://[\w.\-:\[\]]+)")


class DemoFleet:
    """Starts both daemons, waits until the model is loaded, stops them again.

    Ports of 0 are chosen by the system. Children die with us, whatever happens to us.
    """

    def __init__(self, *, model: str, gateway_port: int = 0, neuron_port: int = 0, metrics_port: int = 0) -> None:
        self.model = model
        self.gateway_url = ""
        self.metrics_url = ""
        self.neuron_url = ""
        self._ports = (gateway_port, neuron_port, metrics_port)
        self._children: list[_Child] = []
        self._scratch = tempfile.TemporaryDirectory(prefix="cortex-demo-")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, *, timeout_s: float = 3600.0, on_progress: Callable[[str], None] | None = None) -> None:
        """Bring both daemons up and the model in. Raises `CliError` with the tail of the log of what failed."""
        if importlib.util.find_spec("neuron.cli") is None:
            raise CliError("the demo needs the neuron: pip install 'helexa-cortex-cli[demo]'")
        gateway_port, neuron_port, metrics_port = self._ports
        scratch = Path(self._scratch.name)
        neuron_config = scratch / "neuron.toml"
        # A demo remembers nothing: a neuron that is served on this host must not find its models later.
        # Nor does it come back: what fails is seen here.
        neuron_config.write_text(
            f'state_dir = ""\n[[default_models]]\nmodel_id = {json.dumps(self.model)}\n[server]\nwatchdog_s = 0\n'
        )
        neuron = self._spawn(
            "neuron",
            [
                "-m",
                "neuron",
                "serve",
                "--config",
                str(neuron_config),
                "--host",
                "127.0.0.1",
                "--port",
                str(neuron_port),
            ],
        )
        self.neuron_url = neuron.wait_for(_READY, timeout_s=120)
        config = scratch / "cortex.toml"
        config.write_text(
            'models_config = "models.toml"\n'
            f'[gateway]\nlisten = "127.0.0.1:{gateway_port}"\nmetrics_listen = "127.0.0.1:{metrics_port}"\n'
            "watchdog_s = 0\n"
            "[poll]\ninterval_s = 2\n"
            f'[[neurons]]\nname = "local"\nendpoint = "{self.neuron_url}"\n'
        )
        gateway = self._spawn("gateway", ["-m", "cortex_cli", "serve", "--config", str(config)])
        self.metrics_url = gateway.wait_for(_METRICS, timeout_s=120)
        self.gateway_url = gateway.wait_for(_READY, timeout_s=120)
        self._wait_for_model(timeout_s, on_progress)

    def _wait_for_model(self, timeout_s: float, on_progress: Callable[[str], None] | None) -> None:
        neuron = Gateway(self.neuron_url, timeout_s=30)
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.check()
            for entry in neuron.get("/models"):
                if entry["status"] == "loaded":
                    # The gateway learns of the load by polling: ask it to look now, so that the catalogue that
                    # the first client sees is the true one.
                    Gateway(self.gateway_url, timeout_s=30).get("/admin/fleet?refresh=1")
                    self.model = entry["id"]
                    return
                if entry["status"] == "failed":
                    raise CliError(f"loading {entry['id']} failed: {entry.get('error', 'unknown reason')}")
                if on_progress:
                    on_progress(_progress_text(entry))
            for failure in neuron.get("/health")["activation"]["failed"]:
                raise CliError(f"loading {failure['model_id']} failed: {failure['error']}")
            time.sleep(0.1)
        raise CliError(f"{self.model} was not loaded within {timeout_s:.0f} s")

    def check(self) -> None:
        """Raises `CliError` if a daemon has died."""
        for child in self._children:
            child.check()

    def wait(self) -> None:
        """Serve until interrupted; returns when a daemon ends by itself."""
        while all(child.process.poll() is None for child in self._children):
            time.sleep(0.2)
        self.check()

    def stop(self) -> None:
        """The gateway first, so that it drains towards a neuron that still answers."""
        for child in reversed(self._children):
            child.stop()
        self._children.clear()
        self._scratch.cleanup()

    def _spawn(self, name: str, arguments: list[str]) -> _Child:
        child = _Child(name, arguments, Path(self._scratch.name))
        self._children.append(child)
        return child


class _Child:
    def __init__(self, name: str, arguments: list[str], scratch: Path) -> None:
        self.name = name
        self._log_path = scratch / f"{name}.log"
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._log = self._log_path.open("w", encoding="utf-8")
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        assert self.process.stdout is not None
        threading.Thread(target=self._drain, args=(self.process.stdout,), daemon=True).start()

    def _drain(self, stream: IO[str]) -> None:
        for line in stream:
            self._log.write(line)
            self._log.flush()
            self._lines.put(line)
        self._lines.put(None)

    def wait_for(self, pattern: re.Pattern[str], *, timeout_s: float) -> str:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise CliError(f"the {self.name} did not start within {timeout_s:.0f} s\n{self.log_tail()}") from None
            if line is None:
                raise CliError(f"the {self.name} ended while starting\n{self.log_tail()}")
            match = pattern.search(line)
            if match:
                return match[1]

    def log_tail(self, lines: int = 20) -> str:
        return "\n".join(self._log_path.read_text(encoding="utf-8").splitlines()[-lines:])

    def check(self) -> None:
        code = self.process.poll()
        if code is not None:
            raise CliError(f"the {self.name} ended with exit code {code}\n{self.log_tail()}")

    def stop(self, grace_s: float = 45.0) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(grace_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._log.close()


def _progress_text(entry: dict[str, object]) -> str:
    progress = entry.get("progress")
    if not isinstance(progress, dict) or not progress.get("bytes_total"):
        return f"{entry['id']}: {entry['status']}"
    share = 100 * progress["bytes_done"] // progress["bytes_total"]
    return f"{entry['id']}: {progress['phase']} {share}% of {progress['bytes_total'] / 2**20:.0f} MiB"


def _die_with_parent() -> None:
    """Ask the kernel to send SIGTERM to this child when the thread that made it ends (PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)

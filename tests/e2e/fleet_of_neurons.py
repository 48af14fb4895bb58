"""A gateway in front of several neurons, each a real process with the demo model."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from tests.e2e.fleet_process import MODEL, call, eventually

_LISTENING = re.compile(r"listening on (http://\S+)")


class Daemon:
    """One `neuron` or `cortex` process, in a session of its own. python: of the environment that it runs from."""

    def __init__(
        self,
        name: str,
        arguments: list[str],
        environment: dict[str, str] | None = None,
        *,
        python: str = sys.executable,
    ) -> None:
        self.name = name
        self.output: list[str] = []
        self.process = subprocess.Popen(
            [python, "-m", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
        )
        self._urls: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        url = self._urls.get(timeout=120)
        if url is None:
            raise AssertionError(f"{name} ended while starting:\n" + "".join(self.output))
        self.url = url

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output.append(line)
            if "metrics exporter" not in line and (match := _LISTENING.search(line)):
                self._urls.put(match[1])
        self._urls.put(None)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)
        if number in (signal.SIGSTOP, signal.SIGCONT):  # its keeper is stopped, and it would see that within a second
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
            for child in children.read_text().split() if children.exists() else ():
                os.kill(int(child), number)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def neuron_daemon(folder: Path, index: int, config: str = "", *, python: str = sys.executable) -> Daemon:
    """A neuron named n<index> that begins to load the demo model. config: more of its configuration file."""
    file = folder / f"neuron-{index}.toml"
    file.write_text(f'[[default_models]]\nmodel_id = "{MODEL}"\n{config}')
    arguments = ["neuron", "serve", "--config", str(file), "--host", "127.0.0.1", "--port", "0"]
    return Daemon(f"n{index}", arguments, {"XDG_STATE_HOME": str(folder / f"state-{index}")}, python=python)


class FleetOfNeurons:
    """`neurons[i]` are named n0, n1 … in the gateway, which polls once a second. pythons: of the gateway and of each
    neuron, where they are not of this build."""

    def __init__(
        self,
        folder: Path,
        *,
        num_neurons: int = 2,
        gateway: str = "",
        neuron: str = "",
        pythons: Sequence[str] = (),
    ) -> None:
        pythons = pythons or [sys.executable] * (1 + num_neurons)
        self.neurons: list[Daemon] = []
        for index in range(num_neurons):
            self.neurons.append(neuron_daemon(folder, index, neuron, python=pythons[1 + index]))
        config = folder / "cortex.toml"
        entries = "".join(f'[[neurons]]\nname = "{each.name}"\nendpoint = "{each.url}"\n' for each in self.neurons)
        config.write_text(
            f'[gateway]\nlisten = "127.0.0.1:0"\nmetrics_listen = "127.0.0.1:0"\n{gateway}\n'
            f"[poll]\ninterval_s = 1\n{entries}"
        )
        for each in self.neurons:
            eventually(lambda url=each.url: self.is_loaded(url), within_s=240, what=f"{each.name} has loaded the model")
        self.gateway = Daemon("gateway", ["cortex_cli", "serve", "--config", str(config)], python=pythons[0])
        self.url = self.gateway.url

    @staticmethod
    def is_loaded(url: str) -> bool:
        _, _, body = call(url, "GET", "/models")
        return b'"loaded"' in body

    def stop(self) -> None:
        for daemon in (self.gateway, *self.neurons):
            daemon.stop()

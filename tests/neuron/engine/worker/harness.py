"""An engine served over a socket, by threads of this process."""

from __future__ import annotations

import socket
import threading

from neuron.engine.worker import device_thread
from neuron.engine.worker.main import serve
from neuron.protocol import EngineConfig, Hello, Loaded

from tests.neuron.engine.worker.daemon_side import DaemonSide

CONFIG = EngineConfig(model_id="toy", path="/nowhere", epoch=3)
LOADED = Loaded(3, "Toy", "float32", 200, 101, 64, 4, 128, 0, 0.0)


class Session:
    def __init__(self, monkeypatch, load) -> None:
        self.threads: list[str] = []

        def loader(config, progress):
            self.threads.append(threading.current_thread().name)
            return load(config, progress)

        monkeypatch.setattr(device_thread, "load", loader)
        ours, theirs = socket.socketpair()
        self.daemon = DaemonSide(ours)
        self.exit_code: int | None = None

        def run() -> None:
            with theirs:
                self.exit_code = serve(theirs, epoch=3, rank=0)

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        hello = self.daemon.receive()
        assert isinstance(hello, Hello) and (hello.epoch, hello.rank) == (3, 0)

    def wait_for_exit(self) -> int | None:
        self._thread.join(20)
        assert not self._thread.is_alive()
        return self.exit_code

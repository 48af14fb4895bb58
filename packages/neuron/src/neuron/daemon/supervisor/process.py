"""One engine process: spawned in a session of its own, watched, its output logged, killed with its descendants."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import IO

logger = logging.getLogger("neuron.engine")

_TAIL_LINES = 40
_MAX_LINE_BYTES = 16_384


class EngineProcess:
    """A child process whose end is the future `exited` (its return code; -N for signal N).

    Two daemon threads serve it: one sleeps in waitpid, so the end is known at once and the child never stays a
    zombie; one copies its output, line by line, to the log and keeps the last lines for the reason of a failure.
    """

    def __init__(self, popen: subprocess.Popen[bytes], *, label: str) -> None:
        self._popen = popen
        self._loop = asyncio.get_running_loop()
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self.label = label
        self.pid = popen.pid
        self.exited: asyncio.Future[int] = self._loop.create_future()
        assert popen.stdout is not None
        self._output = threading.Thread(
            target=self._copy_output, args=(popen.stdout,), name=f"engine-log-{self.pid}", daemon=True
        )
        self._output.start()
        threading.Thread(target=self._reap, name=f"engine-wait-{self.pid}", daemon=True).start()

    @classmethod
    def spawn(
        cls, command: Sequence[str], *, environ: Mapping[str, str], label: str, descriptors: Collection[int] = ()
    ) -> EngineProcess:
        """Start `command`, which inherits `descriptors` under the same numbers. Raises `OSError`."""
        popen = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(environ),
            start_new_session=True,
            pass_fds=tuple(descriptors),
        )
        return cls(popen, label=label)

    @property
    def tail(self) -> list[str]:
        """The last lines of output."""
        return list(self._tail)

    def kill(self) -> None:
        """SIGKILL to the process and everything in its session's group."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def dump_stacks(self) -> None:
        """Have the process write the stacks of its threads to its output, and so to our log.

        Only once it has said hello: before, it has no handler for the signal and dies of it.
        """
        if not self.exited.done():
            with suppress(ProcessLookupError, PermissionError):
                os.kill(self.pid, signal.SIGUSR1)

    async def wait(self) -> int:
        """The return code; may be cancelled and called again."""
        return await asyncio.shield(self.exited)

    def describe_exit(self) -> str:
        """How the process ended, in words, with the last thing it said."""
        if not self.exited.done():
            return "is still running"
        code = self.exited.result()
        if code < 0:
            try:
                name = signal.Signals(-code).name
            except ValueError:
                name = str(-code)
            ending = f"was killed by {name}"
        else:
            ending = f"exited with code {code}"
        last = next((line for line in reversed(self._tail) if line.strip()), None)
        return ending if last is None else f"{ending} (last output: {last.strip()[:300]})"

    def _reap(self) -> None:
        code = self._popen.wait()
        self._output.join(timeout=0.2)  # the last words; a grandchild that holds the pipe does not delay us further
        with suppress(RuntimeError):  # the loop is closed: the daemon is gone and nobody waits
            self._loop.call_soon_threadsafe(self._set_exited, code)

    def _set_exited(self, code: int) -> None:
        if not self.exited.done():
            self.exited.set_result(code)

    def _copy_output(self, stream: IO[bytes]) -> None:
        with stream:
            while line := stream.readline(_MAX_LINE_BYTES):
                text = line.decode("utf-8", "replace").rstrip()
                if text:
                    self._tail.append(text)
                    logger.info("[%s] %s", self.label, text)

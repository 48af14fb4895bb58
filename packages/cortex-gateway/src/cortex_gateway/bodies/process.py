"""One process that reads bodies, as the gateway sees it: a connection, and one job at a time."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Literal

from cortex_gateway.bodies.messages import EXIT_OUT_OF_MEMORY, PREFIX_BYTES, Order, Result, decode_done, encode_message

PIECE_BYTES = 256 * 1024
"""As much as the loop hands over, or takes, at a time."""
MEMORY_BYTES = 3 * 2**29
"""What a job may take: JSON takes up to thirty times its size as objects."""
REAP_TIMEOUT_S = 10.0
PASSED_ON = ("PATH", "PYTHONHOME", "LANG", "LC_ALL", "TZ")
"""Of the environment. The rest may hold secrets, and has no meaning there."""

Lost = Literal["cpu", "wall", "memory", "died"]


_ENDS: dict[int, Lost] = {
    -signal.SIGPROF: "cpu",
    -signal.SIGABRT: "memory",  # native code that gets none aborts
    -signal.SIGSEGV: "memory",  # or, as msgspec 0.22's decoder, writes where it got none
    EXIT_OUT_OF_MEMORY: "memory",
}


class ProcessLost(Exception):
    """It is gone, and its job with it."""

    def __init__(self, reason: Lost) -> None:
        super().__init__(reason)
        self.reason: Lost = reason


class BodyProcess:
    """is_over: it takes no more jobs."""

    def __init__(
        self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self.is_over = False

    @classmethod
    async def start(cls) -> BodyProcess:
        """Raises `OSError`."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = await asyncio.to_thread(_spawn, theirs.fileno())
            reader, writer = await asyncio.open_unix_connection(sock=ours, limit=PIECE_BYTES)
        except BaseException:
            ours.close()
            raise
        return cls(process, reader, writer)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def run(self, order: Order, pieces: Iterable[bytes], *, wall_s: float) -> tuple[Result, list[bytes]]:
        """What came of the job, and the pieces of the body that goes with it. Raises `ProcessLost`.

        Whoever is cancelled while it runs ends the process: nobody waits for its result.
        """
        try:
            async with asyncio.timeout(wall_s):
                return await self._run(order, pieces)
        except TimeoutError:
            await self.stop()
            raise ProcessLost("wall") from None
        except (OSError, EOFError):
            await asyncio.to_thread(self._reap)  # by itself, so that it can be told what ended it
            await self.stop()
            raise ProcessLost(_ENDS.get(self._process.returncode, "died")) from None
        except BaseException:
            self._kill()
            raise

    async def _run(self, order: Order, pieces: Iterable[bytes]) -> tuple[Result, list[bytes]]:
        writer, reader = self._writer, self._reader
        writer.write(encode_message(order))
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        length = int.from_bytes(await reader.readexactly(PREFIX_BYTES), "little")
        done = decode_done(await reader.readexactly(length))
        self.is_over = done.is_last
        found: list[bytes] = []
        left = done.result.num_bytes
        while left:
            piece = await reader.read(min(left, PIECE_BYTES))
            if not piece:
                raise EOFError
            found.append(piece)
            left -= len(piece)
        return done.result, found

    async def stop(self) -> None:
        """End it, and wait until it has been reaped."""
        self._kill()
        await asyncio.to_thread(self._reap)

    def _kill(self) -> None:
        self.is_over = True
        self._writer.transport.abort()
        if self._process.poll() is None:
            self._process.kill()

    def _reap(self) -> None:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(REAP_TIMEOUT_S)


def _spawn(descriptor: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-sP", "-m", "cortex_gateway.bodies", str(descriptor), str(MEMORY_BYTES)],
        stdin=subprocess.DEVNULL,
        pass_fds=(descriptor,),
        env={
            **{name: os.environ[name] for name in PASSED_ON if name in os.environ},
            # A launcher may have found the packages where no interpreter looks by itself.
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        },
    )

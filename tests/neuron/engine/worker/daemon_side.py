"""The daemon's end of the protocol for tests: blocking, with a deadline on each read."""

from __future__ import annotations

import socket
from collections.abc import Callable

from neuron.protocol import FromEngine, ToEngine, decode_from_engine, encode_frame, frame_length


class DaemonSide:
    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(60)
        self._socket = connection
        self._stream = connection.makefile("rb")

    def send(self, *messages: ToEngine) -> None:
        for message in messages:
            self._socket.sendall(encode_frame(message))

    def receive(self) -> FromEngine | None:
        """The next frame; None when the engine has closed the connection."""
        prefix = self._stream.read(4)
        if len(prefix) < 4:
            return None
        return decode_from_engine(self._stream.read(frame_length(prefix)))

    def until(self, condition: Callable[[FromEngine], bool]) -> list[FromEngine]:
        """Frames up to and including the first that fulfils the condition."""
        frames: list[FromEngine] = []
        while True:
            frame = self.receive()
            assert frame is not None, f"the engine closed the connection after {frames[-3:]}"
            frames.append(frame)
            if condition(frame):
                return frames

    def close(self) -> None:
        self._stream.close()
        self._socket.close()

"""Entry of an engine process: connects to the daemon, reads frames, and sees to it that the process ends.

The main thread only reads the socket. It never imports torch: that is the device thread's, which it starts when the
first frame, the `EngineConfig`, has come. The process ends when the daemon says so, when the socket closes (the
daemon is gone), when loading fails or when the device is lost.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import logging
import os
import signal
import socket
import sys
from io import BufferedReader

from neuron.engine.worker.channels import Inbox, Outbox
from neuron.engine.worker.device_thread import EXIT_FAULT, EXIT_OK, DeviceThread
from neuron.protocol import (
    PROTOCOL_VERSION,
    Cancel,
    EngineConfig,
    FrameError,
    Generate,
    Hello,
    Ping,
    Pong,
    Shutdown,
    ToEngine,
    decode_to_engine,
    encode_frame,
    frame_length,
)

logger = logging.getLogger(__name__)

# A thread that waits for the GIL gets it after this long. The default of 5 ms would let the reader thread stretch a
# 5 ms step to twice its length.
_SWITCH_INTERVAL_S = 5e-5
# How long the device thread may take to leave its step after the end was announced; then the process ends anyway.
_GRACE_S = 5.0
_FLUSH_S = 2.0
_SEND_BUFFER_BYTES = 4 * 2**20

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask Linux to kill this process when the thread that started it ends, so that no orphan keeps device memory."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def read_frame(stream: BufferedReader) -> ToEngine | None:
    """The next command, None at the end of the stream. Raises `FrameError`."""
    prefix = stream.read(4)
    if len(prefix) < 4:
        return None
    length = frame_length(prefix)
    payload = stream.read(length)
    if len(payload) < length:
        return None
    return decode_to_engine(payload)


def serve(connection: socket.socket, *, epoch: int, rank: int) -> int:
    """Speak the protocol on a connected socket until the end; returns the exit code."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
    inbox, outbox = Inbox(), Outbox(connection)
    outbox.send(encode_frame(Hello(PROTOCOL_VERSION, epoch, rank, os.getpid())))
    stream = connection.makefile("rb")
    device: DeviceThread | None = None

    def on_end() -> None:
        # The reader below wakes up with an end of file. What was sent before still reaches the daemon.
        outbox.flush(_FLUSH_S)
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RD)

    command: ToEngine | None = None
    is_protocol_error = False
    try:
        while True:
            command = read_frame(stream)
            if command is None or isinstance(command, Shutdown):
                break
            if isinstance(command, EngineConfig):
                if device is not None:
                    raise FrameError("a second configuration")
                device = DeviceThread(command, inbox, outbox, rank=rank, on_end=on_end)
                device.start()
            elif isinstance(command, (Generate, Cancel)):
                inbox.put(command)
            elif isinstance(command, Ping):
                outbox.send(encode_frame(Pong(command.nonce)))
    except (FrameError, OSError) as exc:
        logger.error("the connection to the daemon failed: %s", exc)
        is_protocol_error = isinstance(exc, FrameError)
        command = None
    inbox.close()
    if command is None:
        # Nobody reads any more, or all that the device thread said has been flushed: it must not wait for a reader.
        outbox.drop()
    if device is not None:
        device.join(_GRACE_S)
        if not is_protocol_error:
            return device.exit_code
    return EXIT_FAULT if is_protocol_error else EXIT_OK


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m neuron.engine.worker", description=__doc__)
    parser.add_argument("--socket", required=True, help="path of the daemon's Unix socket")
    parser.add_argument("--epoch", type=int, required=True, help="how often this group has been rebuilt")
    parser.add_argument("--rank", type=int, default=0, help="place in the tensor-parallel group")
    arguments = parser.parse_args(argv)

    die_with_parent()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True, chain=False)
    # A signal for the whole process group or the whole systemd unit reaches engines too, but how a drain proceeds is
    # the daemon's decision: it sends `Shutdown`, closes the socket or kills.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    # Read by OpenMP when the device thread imports torch. Its threads spin by default while they wait for each other;
    # on a host that is busy with anything else, a decode step then takes fifty times as long (3 ms became 165 ms).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # The daemon prefixes each line with the model and the rank, and adds the time.
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(arguments.socket)
        return serve(connection, epoch=arguments.epoch, rank=arguments.rank)


def run_and_exit() -> None:
    """Run `main` and end the process at once: a driver that hangs in its clean-up must not keep it alive."""
    code = main()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

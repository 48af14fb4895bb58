"""The process itself: one job after the other, until the gateway closes the connection."""

from __future__ import annotations

import gc
import os
import resource
import signal
import socket
import sys
import traceback

from cortex_core.errors import ApiError

from cortex_gateway.bodies import jobs
from cortex_gateway.bodies.messages import (
    EXIT_OUT_OF_MEMORY,
    PREFIX_BYTES,
    Done,
    Order,
    Refused,
    Result,
    decode_order,
    encode_message,
)

MAX_GROWTH_BYTES = 256 * 2**20
"""A process that a job has made so much larger ends behind it: allocators give little back."""


def main(arguments: list[str]) -> int:
    """arguments: the descriptor of the connection, and the bytes of memory that jobs may take."""
    descriptor, memory_bytes = int(arguments[0]), int(arguments[1])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a terminal's Ctrl-C is for the gateway, which drains first
    gc.disable()  # nothing here refers back, and looking for it costs more than all the rest of a large body
    limit_memory(memory_bytes)
    try:
        _work(descriptor)
    except MemoryError:  # not even for saying so was there any left
        os._exit(EXIT_OUT_OF_MEMORY)
    return 0


def _work(descriptor: int) -> None:
    small = _peak_bytes()
    with socket.socket(fileno=descriptor) as connection:
        while (prefix := _exactly(connection, PREFIX_BYTES)) is not None:
            payload = _exactly(connection, int.from_bytes(prefix, "little"))
            if payload is None:
                break
            order = decode_order(payload)
            result, body = _done(connection, order)
            if result is None:
                break
            is_last = (
                isinstance(result, Refused) and result.is_out_of_memory
            ) or _peak_bytes() - small > MAX_GROWTH_BYTES
            connection.sendall(encode_message(Done(result, is_last)))
            connection.sendall(body)
            if is_last:
                break
            del result, body


def _done(connection: socket.socket, order: Order) -> tuple[Result | None, bytes]:
    """None where the gateway is gone."""
    limit_cpu(order.cpu_s)
    try:
        body = _exactly(connection, order.job.num_bytes)
        if body is None:
            return None, b""
        return jobs.run(order.job, body)
    except ApiError as error:
        return Refused.of(error), b""
    except MemoryError:
        return Refused("request_too_large", "", is_out_of_memory=True), b""
    except RecursionError:
        return Refused("invalid_request", "The body is nested too deeply.", code="invalid_json"), b""
    except Exception as exc:
        traceback.print_exc(file=sys.stderr)
        message = f"The body could not be read: {type(exc).__name__}."
        return Refused("internal", message, code="internal_error"), b""
    finally:
        limit_cpu(0.0)


def limit_cpu(cpu_s: float) -> None:
    """From now on: this process ends by SIGPROF after so much processor time. 0 lifts it."""
    signal.setitimer(signal.ITIMER_PROF, cpu_s)


def limit_memory(more_bytes: int) -> None:
    """Private memory of this process: what it has now and so much more, where the kernel says what that is."""
    try:
        with open("/proc/self/status", "rb") as status:  # noqa: PTH123 - pathlib is not imported here
            found = next((line for line in status if line.startswith(b"VmData:")), None)
    except OSError:
        return
    if found is None:
        return
    limit = int(found.split()[1]) * 1024 + more_bytes
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def _exactly(connection: socket.socket, length: int) -> bytes | None:
    """None at the end of the connection."""
    pieces: list[bytes] = []
    left = length
    while left:
        piece = connection.recv(left, socket.MSG_WAITALL)
        if not piece:
            return None
        pieces.append(piece)
        left -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

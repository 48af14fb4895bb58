"""One worker: a forked process that does one job after the other until something is wrong with one of them."""

from __future__ import annotations

import mmap
import os
import resource
import signal
import socket
import sys
import traceback

import msgspec
from cortex_core.errors import ApiError

from neuron.daemon.text_workers.jobs import Jobs
from neuron.daemon.text_workers.limits import limit_cpu
from neuron.daemon.text_workers.messages import (
    PREFIX_BYTES,
    STAGES,
    Done,
    Hello,
    Job,
    Refused,
    Result,
    Stage,
    encode_frame,
)

MAX_GROWTH_BYTES = 256 * 2**20
"""A worker that a job has made so much larger ends behind it: allocators give little back."""

_decoder = msgspec.msgpack.Decoder(Job)


class StageMark:
    """Where in its job a worker is, in a byte that its host reads when it has ended."""

    def __init__(self, shared: mmap.mmap) -> None:
        self._shared = shared

    def __call__(self, stage: Stage) -> None:
        self._shared[0] = STAGES.index(stage)

    @property
    def stage(self) -> Stage:
        return STAGES[min(self._shared[0], len(STAGES) - 1)]


def work_until_closed(connection: socket.socket, jobs: Jobs, at: StageMark) -> None:
    """Serve the daemon until it closes the connection, or until a job has left the worker worse than it was."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    small, niceness = _peak_bytes(), os.getpriority(os.PRIO_PROCESS, 0)
    connection.sendall(encode_frame(Hello(os.getpid())))
    while (payload := _receive(connection)) is not None:
        job = _decoder.decode(payload)
        body = _exactly(connection, job.num_bytes)
        if body is None:
            return
        at("body")
        result = _done(jobs, job, bytes(body))
        del body
        is_last = (
            (isinstance(result, Refused) and result.is_out_of_memory)
            or _peak_bytes() - small > MAX_GROWTH_BYTES
            or os.getpriority(os.PRIO_PROCESS, 0) != niceness
        )
        answer = encode_frame(Done(result, at.stage, is_last))
        at("start")
        connection.sendall(answer)
        if is_last:
            return
        del result


def _done(jobs: Jobs, job: Job, body: bytes) -> Result:
    limit_cpu(job.cpu_s)
    try:
        return jobs.run(job.work, body)
    except ApiError as exc:
        return Refused.of(exc)
    except MemoryError:
        return Refused("invalid_request", "", is_out_of_memory=True)
    except RecursionError:
        return Refused("invalid_request", "The request is nested too deeply.", code="invalid_value")
    except Exception as exc:
        traceback.print_exc(file=sys.stderr)
        return Refused("internal", f"The request could not be prepared: {type(exc).__name__}.", code="internal_error")
    finally:
        limit_cpu(0.0)


def _receive(connection: socket.socket) -> bytearray | None:
    """The payload of a frame, None at the end."""
    prefix = _exactly(connection, PREFIX_BYTES)
    return None if prefix is None else _exactly(connection, int.from_bytes(prefix, "little"))


def _exactly(connection: socket.socket, length: int) -> bytearray | None:
    data = bytearray(length)
    view, start = memoryview(data), 0
    while start < length:
        received = connection.recv_into(view[start:])
        if not received:
            return None
        start += received
    return data


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

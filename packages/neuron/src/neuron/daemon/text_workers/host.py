"""A model's text host: loads its tokenizer and template, then forks workers and says how they ended.

After the load nothing of the checkpoint and nothing of a client runs in it, so that it can always fork the next worker;
each fork shares what was loaded. It has no threads. It ends when the daemon does.
"""

from __future__ import annotations

import gc
import mmap
import os
import selectors
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from neuron.checkpoint.errors import CheckpointError
from neuron.daemon.prompt.model import LoadStage, TextModel
from neuron.daemon.prompt.tokenizer import TokenizerError
from neuron.daemon.text_workers.jobs import Jobs
from neuron.daemon.text_workers.limits import LOAD_CPU_S, LOAD_MEMORY_BYTES, end_with_parent, limit_cpu, limit_memory
from neuron.daemon.text_workers.messages import (
    FORK,
    KILL,
    YIELD,
    FromHost,
    Loading,
    LoadText,
    TextInfo,
    TextLoaded,
    TextRefused,
    WorkerEnded,
    encode_frame,
)
from neuron.daemon.text_workers.worker import StageMark, work_until_closed

_LONGEST_ORDER = 65_536
_NICENESS = 5
_LONGEST_REASON = 500


class Host:
    """control: frames to the daemon. orders: one datagram an order from it, with a descriptor in that of a fork."""

    def __init__(self, control: socket.socket, orders: socket.socket) -> None:
        self._control = control
        self._orders = orders
        self._pid = os.getpid()
        self._stages: dict[int, mmap.mmap] = {}

    def run(self) -> int:
        """Until the daemon closes its end. Returns the exit code."""
        first = self._orders.recv(_LONGEST_ORDER)
        if not first:
            return 0
        order = msgspec.msgpack.decode(first, type=LoadText)
        model = self._load(order)
        if model is None:
            return 1
        gc.collect()
        gc.freeze()  # forks share the pages of what is never collected
        self._serve(model, order)
        return 0

    # ------------------------------------------------------------------ load

    def _load(self, order: LoadText) -> TextModel | None:
        def at(stage: LoadStage) -> None:
            cpu_s = order.cpu_s if stage == "chat template" else LOAD_CPU_S
            self._send(Loading(stage, cpu_s))
            limit_cpu(cpu_s)

        limit_memory(LOAD_MEMORY_BYTES)
        try:
            model = TextModel.load(Path(order.path), at=at)
            loaded = TextLoaded(_info_of(model))
        except MemoryError:
            self._send(TextRefused(f"it takes more than {LOAD_MEMORY_BYTES // 2**20} MiB of memory"))
            return None
        except (TokenizerError, CheckpointError) as exc:
            self._send(TextRefused(str(exc)[:_LONGEST_REASON]))
            return None
        except Exception as exc:
            traceback.print_exc(file=sys.stderr)
            self._send(TextRefused(f"{type(exc).__name__}: {exc}"[:_LONGEST_REASON]))
            return None
        finally:
            limit_cpu(0.0)
        self._send(loaded)
        return model

    def _send(self, message: FromHost) -> None:
        self._control.sendall(encode_frame(message))

    # ------------------------------------------------------------------ serve

    def _serve(self, model: TextModel, order: LoadText) -> None:
        ends, wakeup = socket.socketpair()
        ends.setblocking(False)
        wakeup.setblocking(False)
        signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        with selectors.DefaultSelector() as selector:
            selector.register(self._orders, selectors.EVENT_READ)
            selector.register(ends, selectors.EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in selector.select()]
                if ends in ready:
                    with suppress(BlockingIOError):
                        ends.recv(4096)
                    self._reap()
                if self._orders in ready:
                    data, descriptors, _, _ = socket.recv_fds(self._orders, _LONGEST_ORDER, 1)
                    if not data:
                        break
                    if data == FORK:
                        self._fork(model, order, socket.socket(fileno=descriptors[0]))
                    elif data[:1] == KILL:
                        self._to_worker(data, lambda pid: os.kill(pid, signal.SIGKILL))
                    elif data[:1] == YIELD:
                        self._to_worker(data, lambda pid: os.setpriority(os.PRIO_PROCESS, pid, _NICENESS))
        for pid in self._stages:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _to_worker(self, data: bytes, do: Callable[[int], None]) -> None:
        pid = int.from_bytes(data[1:], "little")
        if pid in self._stages:  # not reaped: the pid is nobody else's
            with suppress(ProcessLookupError, PermissionError):
                do(pid)

    def _fork(self, model: TextModel, order: LoadText, connection: socket.socket) -> None:
        shared = mmap.mmap(-1, mmap.PAGESIZE)
        pid = os.fork()
        if pid:
            self._stages[pid] = shared
            connection.close()
            return
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            self._control.close()
            self._orders.close()
            end_with_parent(self._pid)
            limit_memory(order.worker_memory_bytes)

            at = StageMark(shared)
            work_until_closed(connection, Jobs(model, drops_attribution=order.drops_attribution, at=at), at)
            code = 0
        except BaseException:
            with suppress(BaseException):
                traceback.print_exc(file=sys.stderr)
        finally:
            with suppress(BaseException):
                sys.stderr.flush()
            os._exit(code)

    def _reap(self) -> None:
        while self._stages:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            shared = self._stages.pop(pid)
            self._send(WorkerEnded(pid, os.waitstatus_to_exitcode(status), StageMark(shared).stage))
            shared.close()


def _info_of(model: TextModel) -> TextInfo:
    table = model.tokenizer.table
    return TextInfo(
        token_bytes=table.all_bytes(),
        special_ids=sorted(table.special_ids),
        strips_leading_space=table.strips_leading_space,
        reasoning=model.reasoning,
        tool_calls=model.tool_calls,
        renders_tools=model.renders_tools,
        can_reason=model.can_reason,
        uses_xml_calls=model.template.uses_xml_calls,
        tokenizer_json=model.tokenizer_json,
    )


def main(arguments: list[str]) -> int:
    """arguments: the descriptors of the two sockets, and the daemon's pid."""
    control, orders, parent = (int(argument) for argument in arguments)
    end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the daemon's to act on
    return Host(socket.socket(fileno=control), socket.socket(fileno=orders)).run()

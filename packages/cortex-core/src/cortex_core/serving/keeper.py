"""A small parent that restarts a daemon which has stopped turning: what `WatchdogSec` does, where no systemd does it.

Run as a program of its own in place of the command that was started (`keeping`), with nothing but the standard library:
its process id is the one that the user knows, the daemon is its child. The daemon tells it by `sd_notify` that it is
ready, that its event loop turns, and that it ends. A daemon whose loop has been silent for too long writes the stacks
of its threads and dies (SIGABRT, then SIGKILL), with every process that it has started, and another is started. So it
is after a signal that nobody sent through here.

Signals that come here go on to the daemon: it has a process group of its own, so that Ctrl-C and signals to whole
groups reach it by this way alone. The daemon's exit is this process's exit, code or signal.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import sys
import time
from contextlib import suppress

TICK_S = 1.0
BEAT_USEC = 1_000_000
"""Told to the daemon as `WATCHDOG_USEC`: it beats at half of it, however much longer its silence may last, and looks
each time whether this process is stopped."""
ABORT_S = 10.0
"""From SIGABRT, when the daemon writes its stacks, to SIGKILL."""
RESTARTS, RESTARTS_S = 4, 600.0
"""So many restarts within so many seconds; then the daemon's last end is the end. As the units have it."""
PAUSES_S = (1.0, 5.0, 15.0, 30.0)

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
DIRECT = (signal.SIGTERM, signal.SIGINT)
SENT_ON = signal.SIGRTMIN
"""What `DIRECT` become on their way to a daemon that serves: it tells them from those that it gets itself."""
WATCHED = (*FORWARDED, signal.SIGCHLD, signal.SIGCONT, signal.SIGTSTP)

_CREDENTIALS_BYTES = 12


class Keeper:
    """limit_s: the longest silence of the daemon's event loop. name: of the daemon, for the log. stream: a descriptor,
    for log lines. command: the daemon's, which is found by its path."""

    def __init__(self, limit_s: float, name: str, stream: int, command: list[str]) -> None:
        self._limit_s = limit_s
        self._name = name
        self._stream = stream
        self._command = command
        self._outer = os.environ.pop("NOTIFY_SOCKET", "")
        self._ignored = [number for number in WATCHED if signal.getsignal(number) == signal.SIG_IGN]
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._notify.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._notify.bind("")  # the kernel picks an abstract address
        self._wake, waker = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(waker, False)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        for number in WATCHED:
            signal.signal(number, lambda *_: None)
        self._poll = select.poll()
        self._poll.register(self._wake, select.POLLIN)
        self._poll.register(self._notify, select.POLLIN)
        self._pid = 0
        self._status: int | None = None
        self._is_ready = self._is_stopping = False
        self._has_beaten = False
        self._sent: set[int] = set()
        self._is_asked_to_end = False
        self._follows = False
        self._restarts: list[float] = []

    def run(self) -> int:
        """Keep the daemon until it ends of its own will; returns its last wait status."""
        while True:
            self._start()
            status = self._watch()
            reason = self._reason_to_restart(status)
            if reason is None or not self._may_restart():
                return status
            pause_s = PAUSES_S[min(len(self._restarts), len(PAUSES_S)) - 1]
            self._say(f"{reason}; starting it again in {pause_s:.0f} s")
            self._wait(pause_s)
            if self._is_asked_to_end:
                return 0

    # ------------------------------------------------------------------ the daemon's life

    def _start(self) -> None:
        self._status = None
        self._is_ready = self._is_stopping = self._has_beaten = False
        self._sent.clear()
        address = self._notify.getsockname()
        environ = {
            **os.environ,
            "NOTIFY_SOCKET": "@" + os.fsdecode(address[1:]),
            "WATCHDOG_USEC": str(BEAT_USEC),
            "CORTEX_KEEPER": str(os.getpid()),
        }
        environ.pop("WATCHDOG_PID", None)
        self._pid = os.fork()
        if self._pid == 0:
            try:
                os.setpgid(0, 0)
                for number in self._ignored:
                    signal.signal(number, signal.SIG_IGN)
                # It is no foreground job any more, and writes to its terminal all the same.
                signal.signal(signal.SIGTTOU, signal.SIG_IGN)
                os.execve(self._command[0], self._command, environ)
            except OSError as exc:
                self._say(f"{self._command[0]} cannot be started: {exc}")
            finally:
                os._exit(127)

    def _watch(self) -> int:
        """Until the daemon has ended. Returns its wait status."""
        silent_s, last_tick = 0.0, time.monotonic()
        is_told_of_stop = False
        while self._status is None:
            self._turn(TICK_S)
            now = time.monotonic()
            # A tick that took far longer was ours: suspended, stopped, or starved, and the daemon with us.
            elapsed, last_tick = min(now - last_tick, 2 * TICK_S), now
            if self._has_beaten:
                silent_s, self._has_beaten = 0.0, False
                is_told_of_stop = False
            elif self._is_ready or self._is_stopping:
                if _state_of(self._pid) in "Tt":  # by somebody who will let it go on, or by a debugger
                    if self._follows:
                        self._follows = False
                        self._kill(signal.SIGCONT)
                    elif not is_told_of_stop:
                        self._say("the daemon is stopped, which is no silence")
                        is_told_of_stop = True
                    continue
                silent_s += elapsed
                if silent_s >= self._limit_s:
                    return self._end_of_silent(silent_s)
        return self._status

    def _end_of_silent(self, silent_s: float) -> int:
        self._say(
            f"the daemon's event loop (process {self._pid}) has been silent for {silent_s:.0f} s, {self._limit_s:g} s "
            "are allowed: it writes the stacks of its threads and is killed"
        )
        descendants = _descendants_of(self._pid)
        with suppress(OSError):
            hard = resource.prlimit(self._pid, resource.RLIMIT_CORE)[1]
            resource.prlimit(self._pid, resource.RLIMIT_CORE, (0, hard))  # prompts and keys are no matter for a disk
        self._kill(signal.SIGABRT)
        deadline = time.monotonic() + ABORT_S
        while self._status is None:
            self._turn(TICK_S)
            if time.monotonic() >= deadline:
                self._kill(signal.SIGKILL)
        for pid, began in descendants:
            if _stat_of(pid)[1] == began:  # not another process of the same number
                _kill_group(pid)
        return self._status

    def _reason_to_restart(self, status: int) -> str | None:
        """None: it has ended as it was told to, by itself, or before it ever served."""
        if not os.WIFSIGNALED(status) or not self._is_ready or self._is_stopping or self._is_asked_to_end:
            return None
        number = os.WTERMSIG(status)
        return None if number in self._sent else f"the daemon was ended by {signal.Signals(number).name}"

    def _may_restart(self) -> bool:
        now = time.monotonic()
        self._restarts = [at for at in self._restarts if now - at < RESTARTS_S]
        if len(self._restarts) >= RESTARTS:
            self._say(f"the daemon was restarted {RESTARTS} times within {RESTARTS_S:.0f} s: giving up")
            return False
        self._restarts.append(now)
        return True

    def _wait(self, seconds: float) -> None:
        """So long, or until this is asked to end."""
        deadline = time.monotonic() + seconds
        while not self._is_asked_to_end and (left := deadline - time.monotonic()) > 0:
            self._turn(left)

    # ------------------------------------------------------------------ what happens

    def _turn(self, seconds: float) -> None:
        """Wait for signals and messages, and heed them."""
        self._poll.poll(seconds * 1000)
        try:
            numbers = os.read(self._wake, 256)
        except BlockingIOError:
            numbers = b""
        self._read_messages()  # first: what the daemon had said before a signal came decides how that is sent on
        for number in numbers:
            self._heed(number)
        self._reap()

    def _heed(self, number: int) -> None:
        if number in FORWARDED:
            self._is_asked_to_end = self._is_asked_to_end or number in ENDING
            # By one way or the other, not by both: the daemon takes those for one signal that came twice.
            if self._is_ready and number in DIRECT and self._sent.isdisjoint(DIRECT):
                number = SENT_ON
            self._sent.add(number)
            self._kill(number)
        elif number == signal.SIGTSTP:
            self._kill(signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGSTOP)
        elif number == signal.SIGCONT:
            self._kill(signal.SIGCONT)

    def _kill(self, number: int) -> None:
        if self._pid and self._status is None:
            with suppress(ProcessLookupError):
                os.kill(self._pid, number)

    def _reap(self) -> None:
        """Every child: as the first process of a container this is the parent of all orphans."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._pid:
                self._status = status

    def _read_messages(self) -> None:
        while True:
            try:
                message, ancillary, _, _ = self._notify.recvmsg(4096, socket.CMSG_SPACE(_CREDENTIALS_BYTES))
            except BlockingIOError:
                return
            senders = [data for level, kind, data in ancillary if kind == socket.SCM_CREDENTIALS]
            if not senders or int.from_bytes(senders[0][:4], sys.byteorder) != self._pid:
                continue  # anybody on this host can write to an abstract address
            lines = message.split(b"\n")
            self._has_beaten = True
            if (
                b"X_FOLLOWS=1" in lines
            ):  # it has seen that we were stopped, and stops: we are not, or would not read this
                self._follows = True
                continue
            self._follows = False
            self._is_ready = self._is_ready or b"READY=1" in lines
            self._is_stopping = self._is_stopping or b"STOPPING=1" in lines
            if self._outer and b"WATCHDOG=1" not in lines:
                self._pass_on(message)

    def _pass_on(self, message: bytes) -> None:
        """To whoever had wanted to be notified of this process."""
        address = "\0" + self._outer[1:] if self._outer.startswith("@") else self._outer
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as outer:
                outer.sendto(message, address)
        except OSError:
            pass

    def _say(self, text: str) -> None:
        now = time.time()
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
        line = f"{at},{int(now % 1 * 1000):03d} WARNING {self._name}.keeper: {text}\n"
        with suppress(OSError):
            os.write(self._stream, line.encode())


def end_as(status: int) -> None:
    """End this process as the one whose wait status this is."""
    if os.WIFEXITED(status):
        os._exit(os.WEXITSTATUS(status))
    number = os.WTERMSIG(status)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)  # the first process of a container does not die of signals


# ---------------------------------------------------------------------- /proc


def _stat_of(pid: int) -> tuple[int, int, str]:
    """Its parent, when it began (in ticks since boot) and its state; zeros where there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return int(fields[1]), int(fields[19]), fields[0].decode()
    except (OSError, IndexError, ValueError):
        return 0, 0, ""


def _state_of(pid: int) -> str:
    return _stat_of(pid)[2] or "?"


def _descendants_of(ancestor: int) -> list[tuple[int, int]]:
    """Every process below it, and when it began, which tells it from a later one of the same number."""
    stats = {int(name): _stat_of(int(name)) for name in os.listdir("/proc") if name.isdigit()}
    below = {ancestor}
    has_grown = True
    while has_grown:
        more = {pid for pid, stat in stats.items() if stat[0] in below and pid not in below}
        has_grown = bool(more)
        below |= more
    return [(pid, stats[pid][1]) for pid in below - {ancestor}]


def _kill_group(pid: int) -> None:
    """Of an engine its whole group, of which it is the first."""
    try:
        if os.getpgid(pid) == pid:
            os.killpg(pid, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


def main() -> None:
    limit_s, name, stream, *command = sys.argv[1:]
    try:
        keeper = Keeper(float(limit_s), name, int(stream), command)
    except OSError:  # without sockets nobody is watched, and is served all the same
        os.environ["CORTEX_KEEPER"] = "none"
        os.execv(command[0], command)
    end_as(keeper.run())


if __name__ == "__main__":
    main()

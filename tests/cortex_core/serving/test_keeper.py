"""A daemon under its keeper, as real processes: who gets which signal, whose end is whose, and who is started again."""

from __future__ import annotations

import os
import pty
import queue
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

DAEMON = Path(__file__).with_name("kept_daemon.py")
LIMIT_S = 3
PATIENCE_S = 90.0
QUICK_S = 1.5
QUICK = "from cortex_core.serving import keeper; keeper.PAUSES_S, keeper.TICK_S = (0.05,), 0.25; keeper.main()"
"""The keeper without its pauses, which looks more often and allows `QUICK_S`."""


class Kept:
    """The keeper's process, and what the daemon says."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process = process
        self.log_path = log
        self.said: list[str] = []
        self._lines: queue.Queue[str | None] = queue.Queue()
        self.pid = self.group = self.child = 0
        self.ignores_hangup = False
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.strip())
        self._lines.put(None)

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def hears(self, what: str) -> str:
        """Waits for a line that begins so."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            line = self._lines.get(timeout=max(deadline - time.monotonic(), 0.01))
            assert line is not None, (f"ended without saying {what!r}", self.said, self.log)
            self.said.append(line)
            if line.startswith(what):
                return line

    def all_said(self) -> list[str]:
        """Until its end."""
        while (line := self._lines.get(timeout=PATIENCE_S)) is not None:
            self.said.append(line)
        return self.said

    def is_ready(self) -> None:
        _, pid, group, child, ignores_hangup, leaked = self.hears("ready").split(" ", 5)
        self.pid, self.group, self.child = int(pid), int(group), int(child)
        self.ignores_hangup = ignores_hangup == "True"
        assert leaked == "[]", "who is started by the daemon is not meant by what the keeper told it"

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def ends_with(self) -> int:
        return self.process.wait(PATIENCE_S)


Start = Callable[..., Kept]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Kept] = []

    def start_one(*arguments: str, quick: bool = False, **options: object) -> Kept:
        command = [sys.executable, str(DAEMON), str(LIMIT_S), *arguments]
        if quick:
            command = [sys.executable, "-c", QUICK, str(QUICK_S), "fake", "2", *command]
        options.setdefault("preexec_fn", lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))  # not as under nohup
        log = tmp_path / f"log{len(started)}"
        with log.open("w") as output:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=output, text=True, start_new_session=True, **options
            )
        started.append(Kept(process, log))
        return started[-1]

    yield start_one
    for each in started:
        for pid in (each.pid, each.child):
            if pid:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if each.process.poll() is None:
            each.process.kill()
        each.process.wait()


def is_alive(pid: int) -> bool:
    """A zombie that nobody has waited for is none of ours any more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


# ---------------------------------------------------------------------- silence


def test_H8_watchdog_a_daemon_whose_loop_is_stuck_is_killed_with_its_children_and_comes_back(start: Start) -> None:
    kept = start()
    kept.is_ready()
    first, child = kept.pid, kept.child
    assert kept.process.pid != first
    kept.signal(signal.SIGUSR2)
    kept.is_ready()
    assert kept.pid != first and kept.process.poll() is None
    until(lambda: not is_alive(first) and not is_alive(child), "the old one is gone, with what it started")
    assert re.search(
        r"fake\.keeper: the daemon's event loop \(process \d+\) has been silent for \d+ s, 3 s are", kept.log
    )
    assert "in block" in kept.log, "the stacks say where it was stuck"
    assert "was ended by SIGABRT; starting it again" in kept.log
    kept.signal(signal.SIGTERM)
    assert kept.ends_with() == 7


def test_H8_watchdog_a_stuck_daemon_that_is_asked_to_end_does_not_come_back(start: Start) -> None:
    kept = start(quick=True)
    kept.is_ready()
    kept.signal(signal.SIGUSR2)
    kept.hears("blocked")
    kept.signal(signal.SIGTERM)
    assert kept.ends_with() == -signal.SIGABRT
    assert not is_alive(kept.pid) and not is_alive(kept.child)
    assert "again" not in kept.log


def test_H8_watchdog_somebody_elses_beat_is_none(start: Start) -> None:
    kept = start(quick=True)
    kept.is_ready()
    environ = Path(f"/proc/{kept.pid}/environ").read_bytes().split(b"\0")
    (address,) = [value[14:] for value in environ if value.startswith(b"NOTIFY_SOCKET=")]
    kept.signal(signal.SIGUSR2)
    kept.hears("blocked")
    stop = threading.Event()

    def pretend() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
            while not stop.wait(0.2):
                with suppress(OSError):
                    other.sendto(b"WATCHDOG=1", b"\0" + address[1:])

    pretending = threading.Thread(target=pretend)
    pretending.start()
    try:
        kept.is_ready()
    finally:
        stop.set()
        pretending.join()


def test_H8_watchdog_who_is_stopped_is_not_stuck(start: Start) -> None:
    """By a debugger, or by hand: the process that is known stands for both."""
    kept = start(quick=True)
    kept.is_ready()
    kept.signal(signal.SIGSTOP)
    until(lambda: state_of(kept.pid) == "T", "the daemon stops with its keeper")
    time.sleep(QUICK_S + 1)  # longer than a loop may be silent, which nothing but time can show
    kept.signal(signal.SIGCONT)
    kept.signal(signal.SIGHUP)
    kept.hears("got SIGHUP")  # it goes on with it
    os.kill(kept.pid, signal.SIGSTOP)
    until(lambda: "is stopped, which is no silence" in kept.log, "the keeper sees it")
    time.sleep(QUICK_S + 1)
    os.kill(kept.pid, signal.SIGCONT)
    kept.signal(signal.SIGHUP)
    kept.hears("got SIGHUP")
    assert "silent for" not in kept.log


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


# ---------------------------------------------------------------------- ends


@pytest.mark.parametrize(("how", "code"), [("before", 3), ("crash", -signal.SIGSEGV)])
def test_H8_watchdog_who_ends_before_it_serves_is_not_started_again(start: Start, how: str, code: int) -> None:
    kept = start(how)
    assert kept.ends_with() == code
    assert "again" not in kept.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_H8_watchdog_a_signal_to_end_comes_once_and_its_code_is_passed_on(start: Start, number: signal.Signals) -> None:
    kept = start()
    kept.is_ready()
    kept.signal(number)
    assert kept.ends_with() == 7
    assert kept.all_said()[1:] == ["asked to end"]


def test_H8_watchdog_a_signal_to_the_whole_group_comes_once(start: Start) -> None:
    kept = start()
    kept.is_ready()
    assert kept.group == kept.pid != os.getpgid(kept.process.pid)
    os.killpg(os.getpgid(kept.process.pid), signal.SIGTERM)
    assert kept.ends_with() == 7
    assert kept.all_said()[1:] == ["asked to end"]


def test_H8_watchdog_a_signal_to_every_process_counts_once(start: Start) -> None:
    """As systemd ends a unit without a watchdog."""
    kept = start()
    kept.is_ready()
    for pid in (kept.pid, kept.process.pid):
        os.kill(pid, signal.SIGTERM)
    assert kept.ends_with() == 7
    assert kept.all_said()[1:] == ["asked to end"]


def test_H8_watchdog_who_asks_twice_has_asked_twice(start: Start) -> None:
    """The second time means: do not wait."""
    kept = start("patient")
    kept.is_ready()
    for _ in range(2):
        kept.signal(signal.SIGTERM)
        kept.hears("asked to end")
    assert kept.ends_with() == 7


def test_H8_watchdog_ctrl_c_on_a_terminal_comes_once(tmp_path: Path) -> None:
    controller, terminal = pty.openpty()
    program = "import os, pty, sys; os.login_tty(0); os.execv(sys.argv[1], sys.argv[1:])"
    if not hasattr(os, "login_tty"):
        program = (
            "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
            "os.execv(sys.argv[1], sys.argv[1:])"
        )
    with subprocess.Popen(
        [sys.executable, "-c", program, sys.executable, str(DAEMON), str(LIMIT_S)],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    ) as process:
        os.close(terminal)
        output = b""

        def read() -> None:
            nonlocal output
            with suppress(OSError):  # EIO: nobody has the terminal any more
                while data := os.read(controller, 4096):
                    output += data

        reading = threading.Thread(target=read)
        reading.start()
        until(lambda: b"ready" in output, "it writes to the terminal")
        os.write(controller, b"\x03")
        assert process.wait(PATIENCE_S) == 7
        reading.join(PATIENCE_S)
        os.close(controller)
    assert output.count(b"asked to end") == 1


def test_H8_watchdog_other_signals_are_passed_on_and_nohup_stays_nohup(start: Start) -> None:
    kept = start()
    kept.is_ready()
    kept.signal(signal.SIGHUP)
    kept.hears("got SIGHUP")
    kept.signal(signal.SIGUSR1)
    until(lambda: "Current thread" in kept.log, "the daemon writes its stacks when asked")
    deaf = start(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    deaf.is_ready()
    assert deaf.ignores_hangup and not kept.ignores_hangup
    deaf.signal(signal.SIGHUP)
    deaf.signal(signal.SIGTERM)
    assert deaf.ends_with() == 7


def test_H8_watchdog_the_daemon_does_not_outlive_its_keeper(start: Start) -> None:
    kept = start()
    kept.is_ready()
    kept.process.kill()
    until(lambda: not is_alive(kept.pid), "the daemon is gone")


def test_H8_watchdog_who_is_killed_comes_back_so_many_times(start: Start) -> None:
    kept = start(quick=True)
    for _ in range(5):
        kept.is_ready()
        os.kill(kept.pid, signal.SIGKILL)
    assert kept.ends_with() == -signal.SIGKILL
    assert kept.log.count("was ended by SIGKILL; starting it again") == 4 and "giving up" in kept.log


def test_H8_watchdog_a_signal_to_end_while_it_waits_ends_the_keeper(start: Start) -> None:
    kept = start()
    kept.is_ready()
    os.kill(kept.pid, signal.SIGKILL)
    until(lambda: "starting it again" in kept.log, "it is about to")
    kept.signal(signal.SIGTERM)
    assert kept.ends_with() in (0, 7)  # 7: it had just been started


def test_H8_watchdog_whoever_wants_to_be_notified_is_of_all_but_the_beat(start: Start) -> None:
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(f"{folder}/notify")
        systemd.settimeout(PATIENCE_S)
        kept = start(env={**os.environ, "NOTIFY_SOCKET": f"{folder}/notify"})
        kept.is_ready()
        assert systemd.recv(100) == b"READY=1"  # the first beat is sent with it
        kept.signal(signal.SIGTERM)
        assert kept.ends_with() == 7
        assert systemd.recv(100) == b"STOPPING=1"


def test_H8_watchdog_who_is_watched_already_has_no_keeper(start: Start) -> None:
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(f"{folder}/notify")
        systemd.settimeout(PATIENCE_S)
        program = (
            f"import os, sys; os.environ['WATCHDOG_PID'] = str(os.getpid()); os.execv({sys.executable!r}, sys.argv[1:])"
        )
        environ = {**os.environ, "NOTIFY_SOCKET": f"{folder}/notify", "WATCHDOG_USEC": "400000"}
        with subprocess.Popen(
            [sys.executable, "-c", program, sys.executable, str(DAEMON), str(LIMIT_S)],
            stdout=subprocess.PIPE,
            env=environ,
            text=True,
        ) as process:
            assert process.stdout is not None
            assert int(process.stdout.readline().split()[1]) == process.pid
            assert [systemd.recv(100) for _ in range(4)] == [b"READY=1", b"WATCHDOG=1", b"WATCHDOG=1", b"WATCHDOG=1"]
            process.send_signal(signal.SIGUSR2)
            assert process.stdout.readline() == "blocked\n"
            systemd.settimeout(0.7)
            with pytest.raises(TimeoutError):
                while True:
                    systemd.recv(100)  # what was under way
            process.kill()


def test_H8_watchdog_a_beat_that_is_wanted_of_another_process_is_not_ours(start: Start) -> None:
    """Started by a service, and not the service itself."""
    kept = start(env={**os.environ, "NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "400000", "WATCHDOG_PID": "1"})
    kept.is_ready()
    assert kept.pid != kept.process.pid

"""A small daemon under the keeper, run as a program: says on stdout what happens to it, and gets stuck when told to.

    python kept_daemon.py LIMIT_S [before|crash|patient]

SIGUSR2 blocks its event loop for ever, SIGTERM and SIGINT end it with code 7, SIGHUP is told. Its child sleeps in a
process group of its own, as an engine does. `before`, `crash`: it ends before it serves, with code 3 or by a signal.
`patient`: it ends when it is asked for the second time.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time

from cortex_core.serving import keeping
from cortex_core.serving.heartbeat import Heartbeat


def say(*words: object) -> None:
    print(*words, flush=True)


def block() -> None:
    """By a name that its stack shows."""
    say("blocked")
    while True:
        time.sleep(1)


async def main() -> int:
    heartbeat = Heartbeat.from_environ(os.environ)
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[int] = loop.create_future()
    num_asked = 0

    def on_end() -> None:
        nonlocal num_asked
        num_asked += 1
        say("asked to end")
        if not ended.done() and ("patient" not in sys.argv or num_asked > 1):
            ended.set_result(7)

    heartbeat.when_asked_to_end(on_end)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        loop.add_signal_handler(signal.SIGHUP, say, "got", "SIGHUP")
    loop.add_signal_handler(signal.SIGUSR2, block)
    # As an engine: a group of its own, and it heeds no signal but the last one.
    child = subprocess.Popen(
        [sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(180)"],
        start_new_session=True,
    )
    leaked = sorted(name for name in os.environ if name.startswith(("NOTIFY_", "WATCHDOG_")) or name == "CORTEX_KEEPER")
    heartbeat.serving()
    say("ready", os.getpid(), os.getpgrp(), child.pid, signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, leaked)
    code = await ended
    heartbeat.stopping()
    child.kill()
    child.wait()
    await asyncio.sleep(0.3)  # another signal would come by now
    return code


if __name__ == "__main__":
    keeping.keep("fake", float(sys.argv[1]), stream=2)
    if "before" in sys.argv:
        sys.exit(3)
    if "crash" in sys.argv:
        os.kill(os.getpid(), signal.SIGSEGV)
    sys.exit(asyncio.run(main()))

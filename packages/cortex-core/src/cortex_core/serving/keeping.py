"""Start of a daemon under the keeper: a command hands its process over, and the keeper starts it again."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress

OWNS_PROCESS = object()
"""The context object of a command line that runs as a process of its own, and not in somebody else's."""

_PR_SET_PDEATHSIG = 1


def keep(name: str, limit_s: float, *, stream: int) -> None:
    """Go on under a keeper, if nobody watches this process yet: then this does not return, and the same command runs
    again as the keeper's child, where it does.

    limit_s: how long the event loop may be silent; 0 wants no keeper. name: of the daemon. stream: a descriptor, for
    log lines.
    """
    is_kept = watchdog_seconds(os.environ) > 0 or "CORTEX_KEEPER" in os.environ
    _be_ready_to_die()
    if is_kept or limit_s <= 0 or sys.platform != "linux" or not sys.executable or not sys.orig_argv:
        return
    program = os.path.join(os.path.dirname(os.path.abspath(__file__)), "keeper.py")
    command = [sys.executable, *sys.orig_argv[1:]]
    sys.stdout.flush()
    sys.stderr.flush()
    # -I -S: neither the environment nor site-packages have a say, and nothing is imported that is not needed.
    os.execv(sys.executable, [sys.executable, "-I", "-S", program, str(limit_s), name, str(stream), *command])


def watchdog_seconds(environ: Mapping[str, str]) -> float:
    """How often somebody wants to hear of this very process; 0 where nobody does (sd_watchdog_enabled)."""
    interval, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID")
    if not interval.isdigit() or (pid is not None and pid != str(os.getpid())):
        return 0.0
    return int(interval) / 1e6


def _be_ready_to_die() -> None:
    """The stacks of all threads are written when this is aborted, by the keeper or by systemd's watchdog, and on
    SIGUSR1; and it does not outlive its keeper."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True, chain=False)
    keeper = os.environ.get("CORTEX_KEEPER", "")
    if keeper.isdigit():
        import ctypes

        with suppress(OSError, AttributeError):
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != int(keeper):  # it went before that
            os._exit(1)

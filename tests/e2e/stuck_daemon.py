"""`cortex` or `neuron` as a user starts it, whose event loop SIGUSR2 blocks for ever.

    python stuck_daemon.py cortex|neuron ARGUMENTS…

The handler is Python's own and runs in the main thread, in the middle of whatever the loop does.
"""

from __future__ import annotations

import signal
import sys
import time


def blocked_for_ever(*_: object) -> None:
    while True:
        time.sleep(1)


if __name__ == "__main__":
    signal.signal(signal.SIGUSR2, blocked_for_ever)
    command = sys.argv.pop(1)
    if command == "cortex":
        from cortex_cli.main import main
    else:
        from neuron.daemon.cli import main
    main()

"""How long it takes until the death of an engine is noticed, and until its model answers again.

    uv run python tests/bench/faults.py [--rounds 4]

Each round opens a stream through the gateway of a demo fleet, kills the engine process with SIGKILL, and takes the
time to the error event of the stream and to the next right answer. Also: from a client's hang-up to an idle neuron.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.e2e.fleet_process import MODEL, FleetProcess, call
from tests.e2e.test_faults import LONG, body, engine_pids_of, load_of, open_stream


def killed_engine(fleet: FleetProcess) -> tuple[float, float]:
    """Seconds from the kill to the error event, and to the next right answer."""
    (pid,) = engine_pids_of(fleet)
    connection, response = open_stream(fleet.url, LONG)
    os.kill(pid, signal.SIGKILL)
    killed = time.perf_counter()
    response.read()
    noticed = time.perf_counter() - killed
    connection.close()
    while True:
        status, _, answer = call(fleet.url, "POST", "/v1/chat/completions", body("What is 12+30?", max_tokens=40))
        if status == 200 and b"42" in answer:
            return noticed, time.perf_counter() - killed
        time.sleep(0.01)


def hung_up_client(fleet: FleetProcess) -> float:
    """Seconds from a client's hang-up to a neuron with nothing in flight, as its /health says."""
    connection, response = open_stream(fleet.url, LONG)
    response.close()
    connection.close()
    left = time.perf_counter()
    while load_of(fleet)["in_flight"]:
        time.sleep(0.001)
    return time.perf_counter() - left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    rounds = parser.parse_args().rounds
    fleet = FleetProcess()
    try:
        rows = [(*killed_engine(fleet), hung_up_client(fleet)) for _ in range(rounds)]
    finally:
        fleet.stop()
    print(f"model {MODEL}, {os.cpu_count()} cores, Python {sys.version.split()[0]}")
    print("round   error event after kill   right answer after kill   idle after hang-up   (seconds)")
    for number, row in enumerate(rows, start=1):
        print(f"{number:5} {row[0]:24.3f} {row[1]:25.3f} {row[2]:20.3f}")
    medians = [statistics.median(column) for column in zip(*rows, strict=True)]
    print(f"median {medians[0]:23.3f} {medians[1]:25.3f} {medians[2]:20.3f}")


if __name__ == "__main__":
    main()

"""How long a neuron works on for a client that has hung up, by phase, through a gateway and through translation.

    uv run python tests/bench/client_gone.py [--rounds 5]

Real processes: a neuron with the demo model and one seat, and two gateways, one of which knows it as a neuron, the
other as a server that speaks only OpenAI chat. A round hangs up in one phase and looks at the neuron's /health until
it has nothing more of the request; the figures contain one such look. `tests/e2e/test_client_gone.py` looks at what is
left.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.e2e.departures import PHASES, WAYS, Departures


async def measure(departures: Departures, rounds: int) -> None:
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}, load {os.getloadavg()}")
    print(f"{'phase':24} median    max  rounds (seconds from the hang-up to an idle neuron)")
    async with departures:
        for way in WAYS:
            for phase in PHASES:
                seconds = []
                for _ in range(rounds):
                    await departures.until(departures.is_idle)
                    seconds.append(await departures.leave(way, phase))
                figures = " ".join(f"{each:.3f}" for each in seconds)
                print(f"{way + ' ' + phase:24} {statistics.median(seconds):6.3f} {max(seconds):6.3f}  {figures}")
        await departures.until(departures.is_idle)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        departures = Departures(Path(folder))
        try:
            asyncio.run(measure(departures, rounds))
        finally:
            departures.stop()


if __name__ == "__main__":
    main()

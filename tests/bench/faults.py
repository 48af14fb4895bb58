"""How long clients wait when an engine fails: from the fault to the next token of a stream that it held.

    uv run python tests/bench/faults.py [--rounds 3] [--ranks 2]

Each round loads the demo model, opens a stream, breaks the engine in one way and takes the longest pause between two
pieces of text that the client got. The answer must be whole; what it is, `tests/chaos` looks at. Pauses contain what
the fault takes to be noticed (a hang: the deadline of a step), a new process, and reading the weights again. Last:
from a client's hang-up to an idle neuron.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.chaos.harness import MODEL, Neuron, eventually, running

REQUEST = {"messages": [{"role": "user", "content": "Count from 1 to 60."}], "temperature": 0, "max_tokens": 400}

Lever = dict[str, Any]
Blow = Callable[[Neuron], None]


def nothing(neuron: Neuron) -> None:
    pass


def faults(ranks: int) -> dict[str, tuple[list[Lever], Blow]]:
    """By name: levers of the load, and what is done once the stream has begun."""
    last = ranks - 1
    return {
        "none": ([], nothing),
        f"rank {last} killed": ([], lambda neuron: neuron.kill_rank(last)),
        f"rank {last} stopped": ([], lambda neuron: neuron.stop_rank(last)),
        "hangs in a step": ([{"lever": "hang", "step": 40, "rank": last, "epochs": [0]}], nothing),
        "device lost": ([{"lever": "device_fault", "step": 40, "epochs": [0]}], nothing),
        "killed twice": ([{"lever": "kill", "step": 1, "epochs": [1]}], lambda neuron: neuron.kill_rank(0)),
    }


async def longest_pause(neuron: Neuron, blow: Blow) -> float:
    """Seconds; the engine is broken after the first text."""
    times: list[float] = []

    def on_text(text: str) -> None:
        if not times:
            blow(neuron)
        times.append(time.perf_counter())

    answer = await neuron.ask(REQUEST, on_text=on_text)
    assert answer.error is None and answer.finish == "stop", answer
    return max(later - earlier for earlier, later in itertools.pairwise(times))


async def hang_up(neuron: Neuron) -> float:
    """Seconds from a client's hang-up to a neuron with nothing in flight, as its /health says."""
    begun = asyncio.Event()
    endless = {**REQUEST, "ignore_eos": True, "max_tokens": 20_000}
    asking = asyncio.create_task(neuron.ask(endless, on_text=lambda text: begun.set()))
    await begun.wait()
    asking.cancel()
    left = time.perf_counter()

    async def is_idle() -> bool:
        return (await neuron.health())["in_flight"] == 0

    await eventually(is_idle)
    return time.perf_counter() - left


async def measure(ranks: int, rounds: int) -> None:
    print(
        f"model {MODEL}, {ranks} ranks, {os.cpu_count()} cores, Python {sys.version.split()[0]}, load {os.getloadavg()}"
    )
    print(f"{'fault':20} median  rounds (seconds without text)")
    with tempfile.TemporaryDirectory() as folder:
        async with running(Path(folder)) as neuron:
            for name, (levers, blow) in faults(ranks).items():
                pauses = []
                for _ in range(rounds):
                    await neuron.load(MODEL, *levers, tensor_parallel=ranks)
                    pauses.append(await longest_pause(neuron, blow))
                    await neuron.unload()
                print(f"{name:20} {statistics.median(pauses):6.2f}  {' '.join(f'{pause:.2f}' for pause in pauses)}")
            await neuron.load(tensor_parallel=ranks)
            waits = [await hang_up(neuron) for _ in range(rounds)]
            print(f"{'client hung up':20} {statistics.median(waits):6.2f}  {' '.join(f'{wait:.2f}' for wait in waits)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=1, help="tensor_parallel of the model")
    arguments = parser.parse_args()
    asyncio.run(measure(arguments.ranks, arguments.rounds))


if __name__ == "__main__":
    main()

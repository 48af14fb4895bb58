"""What the C parser of HTTP/1 saves: the gateway on hypercorn's own HTTP/1 (h11), and on ours (httptools).

    python tests/bench/http1.py [--rounds 4] [--seconds 3] [--stream-seconds 4]

The two are `gateway.http1_parser = "h11"` and `"httptools"`. Everything else is as in `gateway.py`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import gateway


def main() -> None:
    options = gateway.parser(__doc__).parse_args()
    gateway.preamble("http1.py")
    rounds = []
    with tempfile.TemporaryDirectory(prefix="cortex-bench-") as scratch:
        for number in range(1, options.rounds + 1):
            results = {}
            for http1 in ("h11", "httptools") if number % 2 else ("httptools", "h11"):
                asked = argparse.Namespace(**{**vars(options), "http1": http1})
                results[http1] = gateway.one_round("cortex", asked, Path(scratch))
                figures = ", ".join(f"{measure} {value:.1f}" for measure, value in results[http1].items())
                print(f"round {number}, {http1:>10}, us of CPU: {figures}", flush=True)
            rounds.append(results)
    for measure in rounds[0]["h11"]:
        ratios = [one["httptools"][measure] / one["h11"][measure] for one in rounds]
        listed = " ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"CPU per {measure}: {statistics.median(ratios):.2f}x with httptools (rounds: {listed})")


if __name__ == "__main__":
    main()

"""Two builds of this repository in turn: what the gateway and the engine cost, and how fast the engine is.

    python tests/bench/builds.py gateway --base WORKTREE [--rounds 12] [--bar 1.03]
    python tests/bench/builds.py engine --base WORKTREE [--rounds 12] [--model demo|moderate|qwen3-0.6b] [--threads 2]
    python tests/bench/builds.py short [--base WORKTREE] [--rounds 4] [--model moderate] [--long 8000]
    python tests/bench/builds.py streams [--base WORKTREE] [--rounds 4] [--model moderate] [--long 512]

WORKTREE is a checkout of the build to compare with (`git worktree add WORKTREE 7d1037b`) that has an environment of its
own (`uv sync --locked` in it). Each build measures itself with its own `gateway.py` or `engine.py`, so that a build
whose modules have moved needs nothing from this one; here they only take turns. `gateway` starts fresh processes for
each round and loads both at once, so that what disturbs one disturbs the other: CPU per request, streamed chunk and
prompt of 200 kB.
`engine` keeps one worker process of each build: CPU and seconds of the same greedy work, given as `STREAMSxPROMPT+NEW`
(streams at once, tokens of each prompt, tokens of each answer), the answers compared; at the end the CPU around the
model in a step, and what the workers hold.
`short`: a prompt of `--long` tokens alone, then the same beside 20 requests of up to 64 tokens that come one after the
other while it is computed: how long each waits for its first token, beside the median step of the long prompt alone,
and what the long one costs then (less what the short ones take when they come one after the other to an idle engine).
`streams`: 32 streams that decode, alone and then while ten prompts of up to `--long` tokens arrive one after the other:
the longest gap between two tokens of a stream, beside the median gap of the same time.
Without a base, `short` and `streams` measure this build alone.

A bar is met when the upper end of the 90 % interval of the paired ratios (here / base) is at most `--bar`. A round is
marked where a side had less than nine tenths of its processors (other work on the machine): its wall time says nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))  # for a run as a script

from tests.bench.paired import interval

HERE = Path(__file__).parents[2]

_GATEWAY = """
import json, sys, tempfile
from contextlib import ExitStack
from pathlib import Path
import gateway
options = gateway.parser(None).parse_args([])
with ExitStack() as stack:
    for line in sys.stdin:
        asked = json.loads(line)
        if asked == "fresh":
            stack.close()
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            backend = stack.enter_context(gateway.child("_backend", "--events", 100, "--interval", 0.02))
            url = f"http://127.0.0.1:{gateway.first_line(backend)}"
            pid, port = stack.enter_context(gateway.subject("cortex", url, scratch / "log", options))
            print("0", flush=True)
        else:
            print(json.dumps(gateway.measure(pid, port, **asked)), flush=True)
"""
_GATEWAY_KINDS: dict[str, dict[str, float]] = {
    "request": {"clients": 32, "seconds": 5.0},
    "chunk": {"clients": 64, "seconds": 6.0},
    "prompt": {"clients": 8, "seconds": 5.0},
}

_ENGINE = """
import json, os, random, sys, tempfile, time, hashlib
from pathlib import Path
folder, threads, dtype = sys.argv[1:]
import engine, msgspec
make = engine.engine_config
def config(path, threads):
    made = make(path, threads)
    return made if dtype == "default" else msgspec.structs.replace(made, dtype=dtype)
engine.engine_config = config
with tempfile.TemporaryDirectory() as scratch:
    path = Path(folder)
    worker = engine.Worker(path, int(threads), Path(scratch))
    def held(key):
        status = Path(f"/proc/{worker._process.pid}/status").read_text()
        return int(status.partition(key + ":")[2].split()[0]) / 1024
    for line in sys.stdin:
        work = json.loads(line)
        if work == "overhead":
            said, sys.stdout = sys.stdout, open(os.devnull, "w")
            table = engine.overhead(151936)
            sys.stdout = said
            print(json.dumps(table), flush=True)
            continue
        rng = random.Random(work["seed"])
        prompts = [[rng.randrange(work["vocab"]) for _ in range(work["prompt"])] for _ in range(work["streams"])]
        cpu, began = worker.cpu_seconds(), time.perf_counter()
        answers = worker.run(prompts, work["new"])
        wall, cpu = time.perf_counter() - began, worker.cpu_seconds() - cpu
        print(json.dumps({"cpu": cpu, "wall": wall, "answers": answers, "rss": held("VmRSS"), "peak": held("VmHWM")}),
              flush=True)
    worker.close()
"""

_LATENCY = """
import json, os, random, socket, sys, tempfile, time
from pathlib import Path
import engine, msgspec
from neuron.protocol import Cancel
folder, threads, dtype, long_tokens = sys.argv[1:]
long_tokens = int(long_tokens)
make = engine.engine_config
def config(path, threads):
    made = msgspec.structs.replace(make(path, threads), kv_cache_tokens=long_tokens + 16384)
    return made if dtype == "default" else msgspec.structs.replace(made, dtype=dtype)
engine.engine_config = config
rng = random.Random(3)
worker, next_id = None, 0
def send(length, new):
    global next_id
    next_id += 1
    prompt = [rng.randrange(1000) for _ in range(length)]
    worker._socket.sendall(engine.encode_frame(engine.Generate(next_id, prompt, engine.GREEDY, new)))
    return next_id
def next_step():
    while True:
        output = worker._receive()
        if isinstance(output, engine.StepOutput) and output.stats.step:
            return output, time.perf_counter()
def short(num_long, num_short):
    cpu, began, last = worker.cpu_seconds(), time.perf_counter(), time.perf_counter()
    for _ in range(num_long):
        send(long_tokens, 2)
    sent, waits, steps, ended = {}, [], [], 0
    if not num_long:
        sent[send(rng.randint(1, 64), 4)] = began
    while ended < num_long + num_short:
        output, now = next_step()
        steps.append(now - last); last = now
        for update in output.updates:
            if update.request_id in sent and update.token_ids:
                waits.append(now - sent.pop(update.request_id))
            ended += update.finish is not None
        if len(waits) + len(sent) < num_short and not sent:
            sent[send(rng.randint(1, 64), 4)] = time.perf_counter()
    return {"cpu": worker.cpu_seconds() - cpu, "wall": time.perf_counter() - began, "steps": steps, "waits": waits}
def streams(number):
    ids = {send(16, 1000) for _ in range(number)}
    begun, last, gaps, ended, asked = set(), {}, {"alone": [], "beside": []}, 0, None
    cpu = began = None
    while ended < 10:
        output, now = next_step()
        ready = len(begun) == number
        for update in output.updates:
            if update.request_id in ids:
                assert update.finish is None, "the streams end too soon"
                if update.token_ids:
                    begun.add(update.request_id)
                    if ready:
                        if update.request_id in last:
                            gaps["alone" if asked is None else "beside"].append(now - last[update.request_id])
                        last[update.request_id] = now
            elif update.finish is not None:
                ended, asked = ended + 1, 0
        if len(gaps["alone"]) >= 20 * number and not asked and ended < 10:
            if began is None:
                began, cpu = now, worker.cpu_seconds()
            asked = send(rng.randint(1, long_tokens), 4)
    wall, cpu = time.perf_counter() - began, worker.cpu_seconds() - cpu
    for each in ids:
        worker._socket.sendall(engine.encode_frame(Cancel(each)))
    while next_step()[0].stats.running:
        pass
    return {"cpu": cpu, "wall": wall, **gaps}
with tempfile.TemporaryDirectory() as scratch:
    worker = engine.Worker(Path(folder), int(threads), Path(scratch))
    for line in sys.stdin:
        kind, *numbers = json.loads(line)
        print(json.dumps({"short": short, "streams": streams}[kind](*numbers)), flush=True)
    worker.close()
"""


class Work(NamedTuple):
    streams: int
    prompt: int
    new: int

    @classmethod
    def parse(cls, text: str) -> Work:
        streams, _, rest = text.partition("x")
        prompt, _, new = rest.partition("+")
        return cls(int(streams), int(prompt), int(new))

    def __str__(self) -> str:
        return f"{self.streams}x{self.prompt}+{self.new}"


class Build:
    """A build that measures itself, one line of JSON asked and one answered."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None and process.stdout is not None
        self._asks: IO[str] = process.stdin
        self._answers: IO[str] = process.stdout

    def measure(self, what: Any) -> Any:
        self.ask(what)
        return self.answer()

    def ask(self, what: Any) -> None:
        self._asks.write(json.dumps(what) + "\n")
        self._asks.flush()

    def answer(self) -> Any:
        line = self._answers.readline()
        if not line:
            raise SystemExit("a build ended; its words are above")
        return json.loads(line)


@contextmanager
def build(worktree: Path, code: str, *arguments: str) -> Iterator[Build]:
    command = [str(worktree / ".venv/bin/python"), "-c", code, *arguments]
    folder = worktree / "tests/bench"
    process = subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Build(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(60)


def both(stack: ExitStack, base: Path | None, code: str, *arguments: str) -> dict[str, Build]:
    """The sides by name; only this build where there is no base."""
    trees = {"here": HERE} if base is None else {"base": base.resolve(), "here": HERE}
    return {name: stack.enter_context(build(tree, code, *arguments)) for name, tree in trees.items()}


def in_turn(sides: dict[str, Build], what: Any, number: int) -> dict[str, Any]:
    names = list(sides) if number % 2 else list(reversed(sides))
    return {name: sides[name].measure(what) for name in names}


def at_once(sides: dict[str, Build], what: Any) -> dict[str, Any]:
    """What disturbs one disturbs the other."""
    for side in sides.values():
        side.ask(what)
    return {name: side.answer() for name, side in sides.items()}


def verdict(what: str, ratios: list[float], bar: float | None) -> bool:
    low, high = interval(ratios)
    said = "" if bar is None else f", bar {bar}: {'met' if high <= bar else 'MISSED'}"
    print(f"{what}: {low:.3f} to {high:.3f} of the base{said}", flush=True)
    return bar is None or high <= bar


def gateway(options: argparse.Namespace) -> bool:
    measured: dict[str, list[float]] = {}
    with ExitStack() as stack:
        sides = both(stack, options.base, _GATEWAY)
        for number in range(1, options.rounds + 1):
            at_once(sides, "fresh")
            words = []
            for kind, load in _GATEWAY_KINDS.items():
                found = at_once(sides, {"kind": kind, **load})
                base, here = found["base"], found["here"]
                measured.setdefault(kind, []).append(here / base)
                words.append(f"{kind} {base:.1f} -> {here:.1f} ({here / base:.3f})")
            print(f"{number:4}  us of CPU: {', '.join(words)}", flush=True)
    verdicts = [verdict(f"CPU per {kind}", ratios, options.bar) for kind, ratios in measured.items()]
    return all(verdicts)


def engine(options: argparse.Namespace) -> bool:
    sys.path.insert(0, str(Path(__file__).parent))
    from engine import checkpoint, read_hf_config

    is_good = True
    with ExitStack() as stack:
        folder = checkpoint(options.model, Path(stack.enter_context(tempfile.TemporaryDirectory())) / "checkpoint")
        vocab = int(read_hf_config(folder)["vocab_size"])
        arguments = (str(folder), str(options.threads), options.dtype)
        sides = both(stack, options.base, _ENGINE, *arguments)
        for work in options.work:
            cpu: list[float] = []
            wall: list[float] = []
            equal = 0
            for number in range(options.rounds + 1):
                asked = {**work._asdict(), "vocab": vocab, "seed": number}
                found = in_turn(sides, asked, number)
                if not number:
                    continue  # the first round warms up
                base, here = found["base"], found["here"]
                cpu.append(here["cpu"] / base["cpu"])
                wall.append(here["wall"] / base["wall"])
                equal += base["answers"] == here["answers"]
                used = [each["cpu"] / each["wall"] for each in (base, here)]
                note = "" if min(used) >= 0.9 * options.threads else "  (processors were wanting)"
                print(
                    f"{number:4}  {work}  CPU s {base['cpu']:.3f} -> {here['cpu']:.3f} ({cpu[-1]:.3f}), wall s "
                    f"{base['wall']:.3f} -> {here['wall']:.3f} ({wall[-1]:.3f}), CPU/wall {used[0]:.2f} {used[1]:.2f}"
                    f"{note}",
                    flush=True,
                )
            is_good &= verdict(f"{work}: CPU", cpu, options.bar)
            verdict(f"{work}: wall time", wall, None)
            print(f"{work}: answers equal in {equal} of {options.rounds} rounds", flush=True)
        held = {
            name: side.measure({**options.work[0]._asdict(), "vocab": vocab, "seed": 0}) for name, side in sides.items()
        }
        for name, figures in held.items():
            print(f"{name}: resident {figures['rss']:.0f} MiB, at most {figures['peak']:.0f} MiB")
        around: dict[str, list[float]] = {}
        for number in range(max(options.rounds // 3, 1)):
            tables = in_turn(sides, "overhead", number)
            for kind, base in tables["base"].items():
                around.setdefault(kind, []).append(tables["here"][kind] / base)
                print(
                    f"      around 16 decodes, {kind}: {base:.3f} -> {tables['here'][kind]:.3f} ms",
                    flush=True,
                )
        for kind, ratios in around.items():
            verdict(f"around 16 decodes, {kind}", ratios, None)
    return is_good


@contextmanager
def latency_sides(options: argparse.Namespace) -> Iterator[dict[str, Build]]:
    sys.path.insert(0, str(Path(__file__).parent))
    from engine import checkpoint

    with ExitStack() as stack:
        folder = checkpoint(options.model, Path(stack.enter_context(tempfile.TemporaryDirectory())) / "checkpoint")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2 * options.long + 2048}))
        arguments = (str(folder), str(options.threads), options.dtype, str(options.long))
        yield both(stack, options.base, _LATENCY, *arguments)


def short(options: argparse.Namespace) -> bool:
    costs: list[float] = []
    with latency_sides(options) as sides:
        for number in range(1, options.rounds + 1):
            alone, beside, without = (in_turn(sides, ("short", *asked), number) for asked in ((1, 0), (1, 20), (0, 20)))
            for name in sides:
                step, waits = statistics.median(alone[name]["steps"]), sorted(beside[name]["waits"])
                own = without[name]["cpu"]
                cost = (beside[name]["cpu"] - own) / alone[name]["cpu"]
                used = [each[name]["cpu"] / each[name]["wall"] for each in (alone, beside)]
                if name == "here":
                    costs.append(cost)
                print(
                    f"{number:4}  {name}: alone {alone[name]['wall']:.1f} s in steps of {step:.3f} s; first tokens "
                    f"beside it after {waits[len(waits) // 2]:.3f} s in the median, {waits[-1]:.3f} at most "
                    f"({waits[-1] / step:.1f} steps); CPU {cost:.2f} of alone, without the {own:.1f} s that the short "
                    f"ones take by themselves; CPU/wall {used[0]:.2f} {used[1]:.2f}",
                    flush=True,
                )
    low, high = interval(costs)
    print(f"CPU of the long prompt beside the short ones: {low:.3f} to {high:.3f} of alone (bar 1.10)", flush=True)
    return True


def streams(options: argparse.Namespace) -> bool:
    with latency_sides(options) as sides:
        for number in range(1, options.rounds + 1):
            found = in_turn(sides, ("streams", 32), number)
            for name, figures in found.items():
                alone, beside = (statistics.median(figures[key]) for key in ("alone", "beside"))
                longest, longest_alone = max(figures["beside"]), max(figures["alone"])
                print(
                    f"{number:4}  {name}: 32 streams, gaps of {alone:.3f} s alone (longest {longest_alone:.3f}), "
                    f"{beside:.3f} beside prompts; longest there {longest:.3f} ({longest / beside:.2f} of the median, "
                    f"{longest / alone:.2f} of alone); CPU/wall {figures['cpu'] / figures['wall']:.2f}",
                    flush=True,
                )
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["gateway", "engine", "short", "streams"])
    parser.add_argument("--base", type=Path, help="needed by `gateway` and `engine`")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--long", type=int, help="tokens of the long prompts: 8000 (`short`), 512 (`streams`)")
    parser.add_argument("--bar", type=float, default=1.03)
    parser.add_argument("--model", default="moderate", help="as engine.py's")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="default", help="of the engine; default: what each build chooses")
    parser.add_argument(
        "--work",
        type=Work.parse,
        nargs="*",
        default=[Work(1, 128, 64), Work(16, 128, 64)],
        metavar="STREAMSxPROMPT+NEW",
    )
    options = parser.parse_args()
    if options.base is None and options.what in ("gateway", "engine"):
        parser.error(f"{options.what} compares with a base: --base is missing")
    if options.long is None:
        options.long = 512 if options.what == "streams" else 8000
    print("$ python", *sys.argv)
    load = os.getloadavg()[0]
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f}, Python {platform.python_version()}")
    measure = {"gateway": gateway, "engine": engine, "short": short, "streams": streams}[options.what]
    return 0 if measure(options) else 1


if __name__ == "__main__":
    sys.exit(main())

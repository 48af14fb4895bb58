"""Does the neuron keep what it should let go? A long mixed load on a real daemon and its engine, their memory watched.

    python tests/bench/soak_neuron.py [--requests 20000] [--clients 16]

One process is the daemon, one the engine with the demo model, whose cache is so small that prompts push each other out
and sequences are preempted. Of 24 requests some are sums in every dialect (their answers are checked), streams, forced
tool calls, schemas that are ever new, log-probabilities, two choices at once, penalties and biases, thinking, long
prompts that are all different, counting and tokenizing; refusals of each kind; and clients that hang up while they wait
or in the middle of a stream. How memory is judged: `soak_load.py`; the bar is 16 MiB for each of the two, as torch's
allocator keeps what the largest step so far has needed. At the end no page is held.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import random
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # for a run as a script

from tests.bench.soak_load import Ask, Load, gauges_of, soak
from tests.e2e.fleet_of_neurons import FleetOfNeurons, neuron_daemon
from tests.e2e.fleet_process import MODEL, eventually

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
CONFIG = "[engine]\nmax_model_len = 8192\nkv_cache_mb = 64\n[server]\nwatchdog_s = 0\n"
MAX_GROWTH_MIB = 16.0
WORDS = ("cache", "page", "token", "prompt", "engine", "fleet", "model", "stream", "batch", "kernel", "lease", "drain")
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "get_weather", "description": "Current weather in a city", "parameters": CITY}
REFUSED, UNKNOWN = frozenset((400,)), frozenset((404,))


def chat(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 200, **fields}


def schema(number: int) -> dict[str, Any]:
    answer = {"type": "object", "properties": {f"answer{number}": {"type": "integer"}}, "additionalProperties": False}
    answer["required"] = [f"answer{number}"]
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": answer, "strict": True}}


def ask_of(number: int) -> Ask:
    """What the request of that number asks; the same in every run."""
    rng = random.Random(number)
    a, b = rng.randrange(100), rng.randrange(100)
    question, right = f"What is {a}+{b}?", str(a + b)
    prose = " ".join(rng.choice(WORDS) for _ in range(rng.randrange(500, 4000)))
    count = f"Count from 1 to {rng.randrange(20, 60)}"
    sampled = {"temperature": 1.0, "seed": number}
    asks = (
        Ask(CHAT, chat(question), expected=right),
        Ask(MESSAGES, chat(question), expected=right),
        Ask(RESPONSES, {"model": MODEL, "input": question}, expected=right),
        Ask("/v1/completions", {"model": MODEL, "prompt": f"{a} + {b} =", "max_tokens": 16, "logprobs": 2}),
        Ask(CHAT, chat(count, stream=True)),
        Ask(MESSAGES, chat(count, stream=True)),
        Ask(RESPONSES, {"model": MODEL, "input": count, "stream": True}),
        Ask(CHAT, chat("Write a poem.", n=2, logprobs=True, top_logprobs=3, **sampled)),
        Ask(CHAT, chat("Write a poem.", stream=True, presence_penalty=0.5, logit_bias={"7": -5}, top_p=0.9, **sampled)),
        Ask(CHAT, chat(question, chat_template_kwargs={"enable_thinking": True}), expected=right),
        Ask(CHAT, chat(question, response_format=schema(number)), expected=f"answer{number}"),
        Ask(
            CHAT,
            chat(
                "What is the weather in Oslo?",
                tools=[{"type": "function", "function": WEATHER}],
                tool_choice="required",
            ),
            expected="Oslo",
        ),
        Ask(CHAT, chat(f"{prose}\n\n{question}", max_tokens=4)),
        Ask(CHAT, chat(f"{prose}\n\n{count}", stream=True)),
        Ask(CHAT, chat(count, stop=["7"])),
        Ask("/v1/messages/count_tokens", {"model": MODEL, "messages": chat(prose)["messages"]}),
        Ask("/tokenize", {"model": MODEL, "prompt": prose}),
        Ask(CHAT, {**chat(question), "model": "soak/unknown"}, UNKNOWN),
        Ask(CHAT, {"model": MODEL}, REFUSED),
        Ask(CHAT, chat(prose * 20), REFUSED),
        Ask(
            CHAT,
            chat(
                question, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 5}}}
            ),
            REFUSED,
        ),
        Ask(CHAT, chat(count, stream=True), hangs_up=True),
        Ask(CHAT, chat(f"{prose}\n\n{count}"), hangs_up=True),
        Ask("/metrics", {}),
    )
    return asks[number % len(asks)]


def engine_of(daemon: int) -> int:
    """The pid of the daemon's only engine process."""
    children = Path(f"/proc/{daemon}/task/{daemon}/children").read_text().split()
    (engine,) = (int(pid) for pid in children if b"neuron.engine.worker" in Path(f"/proc/{pid}/cmdline").read_bytes())
    return engine


def gauges(url: str) -> dict[str, float]:
    """What is at work according to the metrics; each is 0 when nothing is."""
    found = gauges_of(
        f"{url}/metrics",
        (
            *("neuron_requests_in_flight{", "neuron_queue_depth{", "neuron_engine_running{", "neuron_engine_waiting{"),
            *("neuron_kv_pages{", "neuron_kv_free_pages{"),
        ),
    )
    total = sum(found.pop(name) for name in list(found) if name.startswith("neuron_kv_pages{"))
    free = sum(found.pop(name) for name in list(found) if name.startswith("neuron_kv_free_pages{"))
    return {**found, "pages held": total - free}


def run(options: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="neuron-soak-") as scratch:
        daemon = neuron_daemon(Path(scratch), 0, CONFIG)
        try:
            eventually(lambda: FleetOfNeurons.is_loaded(daemon.url), within_s=240, what="the model is loaded")
            pid = daemon.process.pid
            return asyncio.run(
                soak(
                    {"daemon": pid, "engine": engine_of(pid)},
                    Load(daemon.url, ask_of),
                    requests=options.requests,
                    events=0,
                    clients=options.clients,
                    at_work=lambda: gauges(daemon.url),
                    max_growth_mib=MAX_GROWTH_MIB,
                )
            )
        finally:
            daemon.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--clients", type=int, default=16)
    options = parser.parse_args()
    print("command:", " ".join(["python", "tests/bench/soak_neuron.py", *sys.argv[1:]]))
    print(f"machine: {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print("versions:", ", ".join(f"{name} {version(name)}" for name in ("torch", "hypercorn", "uvloop")))
    return run(options)


if __name__ == "__main__":
    raise SystemExit(main())

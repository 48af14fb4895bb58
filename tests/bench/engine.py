"""neuron's engine on the CPU against `transformers` generate, on the same weights and prompts, in one run.

Run: python tests/bench/engine.py [--model demo|moderate|qwen3-0.6b|PATH] [--rounds 5] [--threads N] [--json FILE]

Each round gives every side the same new random prompts and the same number of greedy output tokens, one after the
other, in an order that rotates. Sides: `engine` (neuron in this process), `worker` (neuron's worker process, through
the socket protocol, timed from the first frame sent to the last update read), `transformers` (`generate` with its
default dynamic cache and SDPA, left-padded static batch). All compute in float32 with the same number of threads,
which sleep and do not spin while they wait for each other (`OMP_WAIT_POLICY=active` in the environment changes that).
Then the cost of everything around the model is measured: one decode step of 16 sequences with a model that does
nothing, in CPU time of the step thread.

Prints every round, the ratio to transformers of each round and its median (bars: 1.0 for one stream, 1.5 for 16), by
wall clock and by CPU time (which a busy machine disturbs less), and how many of the answers agree. Exit code 1 if a
bar is missed by the wall clock.
"""

from __future__ import annotations

import os

# As neuron's worker sets it, and before torch is imported: threads that spin ruin every figure on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import json
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from cortex_core.serving.garbage import settle
from neuron.engine.attention.interface import StepContext
from neuron.engine.kv_cache.kv_cache import KVLayout, PagedKV
from neuron.engine.loading.loading import load_engine, read_hf_config
from neuron.engine.scheduler.step_limits import StepLimits
from neuron.engine.step.engine import Engine
from neuron.engine.step.runner import ModelRunner
from neuron.host_memory import num_physical_cores
from neuron.protocol import (
    EngineConfig,
    Generate,
    Loaded,
    SamplingParams,
    Shutdown,
    StepOutput,
    decode_from_engine,
    encode_frame,
    frame_length,
)
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3Config, Qwen3ForCausalLM

BARS = {1: 1.0, 16: 1.5}
GREEDY = SamplingParams(temperature=0.0)
SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 640,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
    },
    "moderate": {
        "vocab_size": 32_000,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
    },
    "qwen3-0.6b": {
        "vocab_size": 151_936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}

Prompts = list[list[int]]
Answers = list[list[int]]


class Side(Protocol):
    """One of the engines that are compared."""

    def run(self, prompts: Prompts, new_tokens: int) -> Answers:
        """Generate `new_tokens` tokens greedily for each prompt."""
        ...

    def cpu_seconds(self) -> float:
        """Processor time that this side has used so far."""
        ...


def checkpoint(name: str, folder: Path) -> Path:
    """The folder of a named model; random weights of a shape are written to `folder`, as bfloat16 like most."""
    if name == "demo":
        return Path(str(files("neuron") / "demo_model"))
    if name not in SHAPES:
        return Path(name)
    torch.manual_seed(0)
    # Wider weights than the default 0.02: answers then differ from prompt to prompt and have few near-ties.
    config = Qwen3Config(max_position_embeddings=4096, tie_word_embeddings=True, initializer_range=0.05, **SHAPES[name])
    Qwen3ForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def engine_config(path: Path, threads: int) -> EngineConfig:
    return EngineConfig(model_id="bench", path=str(path), num_threads=threads, kv_cache_tokens=16_384)


def requests(prompts: Prompts, new_tokens: int, first_id: int) -> list[Generate]:
    return [Generate(first_id + index, prompt, GREEDY, new_tokens) for index, prompt in enumerate(prompts)]


def collect(answers: Answers, output: StepOutput, first_id: int) -> int:
    """Take a step's updates; returns how many sequences it finished."""
    if output.failures:
        raise RuntimeError(str(output.failures))
    for update in output.updates:
        answers[update.request_id - first_id] += update.token_ids
    return sum(update.finish is not None for update in output.updates)


class InProcess:
    """neuron's engine in this process."""

    def __init__(self, path: Path, threads: int) -> None:
        self._engine, _ = load_engine(engine_config(path, threads))

    def run(self, prompts: Prompts, new_tokens: int) -> Answers:
        answers: Answers = [[] for _ in prompts]
        for item in requests(prompts, new_tokens, 0):
            self._engine.add(item)
        while self._engine.has_work:
            output = self._engine.step()
            assert output is not None
            collect(answers, output, 0)
        return answers

    def cpu_seconds(self) -> float:
        return time.process_time()


class Worker:
    """The worker process behind its socket."""

    def __init__(self, path: Path, threads: int, folder: Path) -> None:
        address = folder / "worker.sock"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(address))
            listener.listen()
            command = [sys.executable, "-m", "neuron.engine.worker", "--socket", str(address), "--epoch", "0"]
            self._process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            self._socket, _ = listener.accept()
        self._stream = self._socket.makefile("rb")
        self._next_id = 0
        self._socket.sendall(encode_frame(engine_config(path, threads)))
        while not isinstance(self._receive(), Loaded):
            pass

    def _receive(self) -> Any:
        prefix = self._stream.read(4)
        if len(prefix) < 4:
            raise RuntimeError("the worker has gone")
        return decode_from_engine(self._stream.read(frame_length(prefix)))

    def run(self, prompts: Prompts, new_tokens: int) -> Answers:
        answers: Answers = [[] for _ in prompts]
        first_id = self._next_id
        self._next_id += len(prompts)
        for item in requests(prompts, new_tokens, first_id):
            self._socket.sendall(encode_frame(item))
        missing = len(prompts)
        while missing:
            missing -= collect(answers, self._receive(), first_id)
        return answers

    def cpu_seconds(self) -> float:
        own = time.process_time()
        tasks = Path(f"/proc/{self._process.pid}/task").iterdir()
        return own + sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9

    def close(self) -> None:
        self._socket.sendall(encode_frame(Shutdown()))
        self._process.wait(20)
        self._stream.close()
        self._socket.close()


class Transformers:
    """`generate` in this process."""

    def __init__(self, path: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").eval()
        # Nothing of the checkpoint's own generation settings: greedy, and no end but the number of tokens.
        self._model.generation_config = GenerationConfig(
            do_sample=False, pad_token_id=0, eos_token_id=None, use_cache=True
        )

    @torch.inference_mode()
    def run(self, prompts: Prompts, new_tokens: int) -> Answers:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        generated = self._model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens)
        answers: Answers = generated[:, longest:].tolist()
        return answers

    def cpu_seconds(self) -> float:
        return time.process_time()


def compare(
    sides: dict[str, Side], streams: int, *, rounds: int, prompt_tokens: tuple[int, int], new_tokens: int, vocab: int
) -> dict[str, Any]:
    """Alternate the sides; one unrecorded round first."""
    rng = random.Random(streams)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    agreeing = total = 0
    low, high = prompt_tokens
    print(
        f"\n{streams} stream(s), prompts of {low} to {high} tokens, {new_tokens} output tokens each; tokens/s per round"
    )
    for number in range(-1, rounds):
        prompts = [[rng.randrange(vocab) for _ in range(rng.randint(low, high))] for _ in range(streams)]
        order = list(sides)
        shift = number % len(order)
        answers: dict[str, Answers] = {}
        elapsed: dict[str, float] = {}
        used: dict[str, float] = {}
        for name in order[shift:] + order[:shift]:
            before, started = sides[name].cpu_seconds(), time.perf_counter()
            answers[name] = sides[name].run(prompts, new_tokens)
            elapsed[name], used[name] = time.perf_counter() - started, sides[name].cpu_seconds() - before
            assert all(len(answer) == new_tokens for answer in answers[name])
        if number < 0:
            continue
        for name in sides:
            seconds[name].append(elapsed[name])
            cpu[name].append(used[name])
        agreeing += sum(a == b for a, b in zip(answers["engine"], answers["transformers"], strict=True))
        total += streams
        rates = "  ".join(f"{name} {streams * new_tokens / elapsed[name]:8.1f}" for name in sides)
        print(f"  round {number}: {rates}")
    result: dict[str, Any] = {
        "streams": streams,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "agreeing": agreeing,
        "answers": total,
    }
    for name in ("engine", "worker"):
        for kind, figures in (("wall clock", seconds), ("CPU time", cpu)):
            ratios = [theirs / ours for ours, theirs in zip(figures[name], figures["transformers"], strict=True)]
            median = statistics.median(ratios)
            if figures is seconds:
                result[f"{name}_ratio"] = median
            each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            print(f"  {name} / transformers by {kind}: median {median:.2f}x of {each}")
    print(f"  equal answers of engine and transformers: {agreeing} of {total}")
    return result


class NoModel:
    """Answers at once with logits made beforehand, so that only what surrounds a model takes time."""

    def __init__(self, vocab: int, rows: int) -> None:
        self._logits = torch.randn(rows, vocab) * 3.0
        self.seconds = 0.0

    def prepare(self, batch: Any) -> None:
        pass

    def forward(self, ctx: StepContext) -> torch.Tensor:
        return torch.zeros(ctx.batch.num_tokens, 1)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        started = time.thread_time()
        logits = self._logits[: hidden.shape[0]].clone()
        self.seconds += time.thread_time() - started
        return logits


def overhead(vocab: int, *, streams: int = 16, context: int = 512, steps: int = 200) -> dict[str, float]:
    """CPU milliseconds per decode step around the model, per kind of sampling, median of `steps`."""
    kinds = {
        "greedy": {"temperature": 0.0},
        "top_k 20, top_p 0.8": {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
        "temperature only": {"temperature": 1.0},
        "greedy, 5 logprobs": {"temperature": 0.0, "logprobs": 5},
    }
    settle()  # as a worker does after a load
    cpu = torch.device("cpu")
    table: dict[str, float] = {}
    print(f"\nper-step overhead, {streams} decodes of {context} tokens context, vocabulary {vocab} (aim: below 2 ms)")
    for kind, sampling in kinds.items():
        model = NoModel(vocab, streams)
        pages = streams * (context + steps + 64) // 16 + 1
        limits = StepLimits(max_step_tokens=2048, max_running=256, max_model_len=context + steps + 64)
        kv = PagedKV(KVLayout.uniform(1, 1, 1, 16, torch.float32), pages, cpu)
        engine = Engine(ModelRunner(model, kv, model, vocab_size=vocab, limits=limits))  # type: ignore[arg-type]
        for index in range(streams):
            prompt = [(index * 31 + position) % vocab for position in range(context)]
            engine.add(Generate(index, prompt, SamplingParams(seed=index, **sampling), 10**6))
        while engine.stats().decode_tokens < 2 * streams:
            engine.step()
        costs: list[float] = []
        frames: list[float] = []
        for _ in range(steps):
            model.seconds = 0.0
            started = time.thread_time()
            output = engine.step()
            stepped = time.thread_time()
            assert output is not None
            decode_from_engine(memoryview(encode_frame(output))[4:])
            framed = time.thread_time()
            costs.append(framed - started - model.seconds)
            frames.append(framed - stepped)
        table[kind] = statistics.median(costs) * 1e3
        print(
            f"  {kind:22} {table[kind]:6.3f} ms, of which encoding and decoding the frame "
            f"{statistics.median(frames) * 1e3:.3f} ms"
        )
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="demo, moderate, qwen3-0.6b, or a checkpoint folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=num_physical_cores())
    parser.add_argument("--streams", type=int, nargs="*", default=list(BARS))
    parser.add_argument("--prompt-tokens", type=int, nargs=2, default=(32, 128), metavar=("MIN", "MAX"))
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()

    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    torch.set_num_threads(arguments.threads)
    sys.setswitchinterval(5e-5)
    print("command: python tests/bench/engine.py", *sys.argv[1:])
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, {arguments.threads} thread(s), "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        path = checkpoint(arguments.model, Path(folder) / "checkpoint")
        vocab = int(read_hf_config(path)["vocab_size"])
        worker = Worker(path, arguments.threads, Path(folder))
        stack.callback(worker.close)
        sides: dict[str, Side] = {
            "engine": InProcess(path, arguments.threads),
            "worker": worker,
            "transformers": Transformers(path),
        }
        results = [
            compare(
                sides,
                streams,
                rounds=arguments.rounds,
                prompt_tokens=tuple(arguments.prompt_tokens),
                new_tokens=arguments.new_tokens,
                vocab=vocab,
            )
            for streams in arguments.streams
        ]
    table = overhead(vocab)
    missed = [
        f"{name} at {result['streams']} stream(s): {result[f'{name}_ratio']:.2f}x, bar {BARS[result['streams']]}x"
        for result in results
        for name in ("engine", "worker")
        if result[f"{name}_ratio"] < BARS.get(result["streams"], 0.0)
    ]
    print("\n" + ("missed: " + "; ".join(missed) if missed else "every bar is held"))
    if arguments.json:
        figures = {"model": arguments.model, "threads": arguments.threads, "results": results, "overhead_ms": table}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

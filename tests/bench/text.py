"""What the daemon's text work costs per token and per prompt.

Run: `python tests/bench/text.py [--tokens 20000] [--rounds 5]`. Aim: below 15 µs per streamed token without logprobs.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import llguidance
import neuron
from cortex_core.conversation import Limits, Reasoning, Request, ResponseFormat, TextPart, ToolDefinition, Turn
from neuron.daemon.prompt.model import TextModel
from neuron.protocol import Logprobs

PROSE = "The weather in Oslo is cloudy today, with 14 degrees and a light wind from the west. Was kostet das? 東京 🇩🇪\n"
TOOL = ToolDefinition(
    "write_file",
    "Writes a file",
    {
        "type": "object",
        "properties": {"path": {"type": "string"}, "content": {"type": "string"}, "mode": {"type": "integer"}},
        "required": ["path", "content"],
    },
)


def ask(**fields: object) -> Request:
    return Request(model="demo", turns=(Turn("user", (TextPart("hello"),)),), **fields)  # type: ignore[arg-type]


def best(rounds: int, work: Callable[[], None]) -> tuple[float, list[float]]:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times), times


def stream_cases(model: TextModel, num_tokens: int) -> dict[str, tuple[Request, list[int]]]:
    def repeated(text: str) -> list[int]:
        ids = model.tokenizer.encode(text)
        return (ids * (num_tokens // len(ids) + 1))[:num_tokens]

    body = PROSE.replace("\n", "\\n") * 200
    call = f'<tool_call>\n{{"name": "write_file", "arguments": {{"path": "a", "content": "{body}"}}}}\n</tool_call>'
    xml = (
        "<tool_call>\n<function=write_file>\n<parameter=path>\na\n</parameter>\n"
        f"<parameter=content>\n{PROSE * 200}</parameter>\n</function>\n</tool_call>\n"
    )
    stops = Limits(stop=("\n\nUser:", "</answer>", "STOP"))
    return {
        "plain text": (ask(), repeated(PROSE)),
        "with three stop strings": (ask(limits=stops), repeated(PROSE)),
        "with tools, text only": (ask(tools=(TOOL,)), repeated(PROSE)),
        "reasoning": (ask(reasoning=Reasoning(mode="on")), [model.tokenizer.encode("<think>")[0], *repeated(PROSE)]),
        "JSON tool calls": (ask(tools=(TOOL,)), repeated(call)),
        "XML tool calls": (ask(tools=(TOOL,)), repeated(xml)),
        "logprobs, five alternatives": (ask(logprobs=5), repeated(PROSE)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", type=Path, default=Path(neuron.__file__).parent / "demo_model")
    options = parser.parse_args()
    print(f"$ {' '.join(sys.argv)}")
    print(f"{platform.machine()}, Python {platform.python_version()}, model {options.model.name}")
    start = time.perf_counter()
    model = TextModel.load(options.model)
    print(f"load: {(time.perf_counter() - start) * 1e3:.0f} ms, vocabulary {model.tokenizer.vocab_size}")

    print("\nstream, µs per token (median of the rounds; one token a call)")
    for name, (request, ids) in stream_cases(model, options.tokens).items():
        prompt = model.render(request)[0]
        given = [Logprobs(-0.5, [1, 2, 3, 4, 5], [-0.5, -1.0, -2.0, -3.0, -4.0])] if request.logprobs else None

        def run(request: Request = request, ids: list[int] = ids, prompt=prompt, given=given) -> None:  # type: ignore[no-untyped-def]
            stream = model.event_stream(request, prompt)
            for token_id in ids:
                stream.feed([token_id], given)
            stream.finish("stop")

        median, times = best(options.rounds, run)
        rounds = " ".join(f"{t / len(ids) * 1e6:.2f}" for t in times)
        print(f"  {name:30} {median / len(ids) * 1e6:6.2f}   rounds: {rounds}")

    print("\nprompts, ms")
    for size in (2_000, 50_000, 400_000):
        turn = Turn("user", (TextPart((PROSE * (size // len(PROSE) + 1))[:size]),))
        request = Request(model="demo", turns=(turn,), tools=(TOOL,) * 12)
        num_tokens = model.render(request)[0].num_tokens
        median, times = best(options.rounds, lambda request=request: model.render(request))  # type: ignore[misc]
        rounds = " ".join(f"{t * 1e3:.2f}" for t in times)
        print(f"  render {size:7} characters, {num_tokens:6} tokens: {median * 1e3:8.2f}   rounds: {rounds}")

    print("\ngrammars, ms (a schema seen before is only assembled)")
    for name, extra in (("first time", True), ("seen before", False)):
        count = iter(range(10**6))

        def build(extra: bool = extra, count=count) -> None:  # type: ignore[no-untyped-def]
            schema = {**TOOL.parameters, "title": f"t{next(count)}" if extra else "same"}  # type: ignore[dict-item]
            request = ask(response_format=ResponseFormat("json_schema", schema))
            model.resolve(request, model.render(request), max_model_len=4096)

        median, times = best(options.rounds, build)
        print(f"  {name:12} {median * 1e3:8.2f}   rounds: {' '.join(f'{t * 1e3:.2f}' for t in times)}")
    print(f"  llguidance {llguidance.get_version()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""One process of the fuzz over text: draws requests, runs each from its body to its last event, holds it to its budget.

`python -m tests.fuzz.text_budget SEED COUNT FILE`. What is being tried stands in FILE, for whoever finds this process
ended: work that Python does not see (grammars, tokenizers) is bounded by processor time, far beyond what any needs.
"""

from __future__ import annotations

import cProfile
import gc
import json
import logging
import resource
import signal
import sys
import tempfile
import tracemalloc
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from cortex_core.conversation import Request
from cortex_core.dialects import anthropic_messages, openai_chat, openai_completions, openai_responses
from cortex_core.dialects.openai_chat_client import write_request
from cortex_core.errors import ApiError
from cortex_core.events import Usage
from cortex_gateway.identity.estimate import estimate
from cortex_gateway.observability.redaction import clean_body
from cortex_gateway.placement.session_hints import RequestHints
from cortex_gateway.surfaces.envelope import read_envelope, with_model
from hypothesis import HealthCheck, Phase, given, seed, settings
from neuron.daemon.prompt.chat_template import ChatTemplate
from neuron.daemon.prompt.model import TextModel

from tests.fuzz.hostile_requests import OUTPUTS, TEMPLATE_SOURCES, requests
from tests.neuron.daemon.prompt.checkpoints import load

WINDOW = 16_384
KILL_CPU_S = 20.0
"""Of one example. The slowest take one or two, most of it in the grammar compiler."""
MAX_ADDRESS_BYTES = 6 * 2**30

CALLS, CALLS_PER_BYTE, CALLS_PER_TOKEN = 30_000, 12, 150
BYTES, BYTES_PER_BYTE, BYTES_PER_TOKEN = 6_000_000, 120, 1_000
MAX_MESSAGE = 2_000

PARSERS: dict[str, Callable[[bytes], Request]] = {
    "chat_completion": openai_chat.parse,
    "messages": anthropic_messages.parse,
    "responses": openai_responses.parse,
    "completion": openai_completions.parse,
    "count_messages": anthropic_messages.parse_count_tokens,
    "count_responses": openai_responses.parse_input_tokens,
}
DIALECTS: dict[str, Any] = {
    "chat_completion": openai_chat,
    "messages": anthropic_messages,
    "responses": openai_responses,
    "completion": openai_completions,
}


class Spent:
    """Calls and memory of what runs inside."""

    def __init__(self) -> None:
        self.calls = 0
        self.num_bytes = 0
        self._profiler = cProfile.Profile(subcalls=False)

    def __enter__(self) -> Spent:
        tracemalloc.start()
        self._profiler.enable()
        return self

    def __exit__(self, *exc: object) -> None:
        self._profiler.disable()
        self.num_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        self.calls = sum(entry.callcount for entry in self._profiler.getstats())


@cache
def checkpoint() -> TextModel:
    return load(Path(tempfile.mkdtemp()))


def with_template(source: str) -> TextModel:
    """A model of its own: nothing has been compiled for it yet."""
    template = ChatTemplate({"default": source}, {"eos_token": "<|im_end|>"})
    return TextModel(checkpoint().tokenizer, template, checkpoint().defaults)


def at_the_gateway(body: bytes) -> None:
    read_envelope(body)
    with_model(body, "another/name")
    estimate(body, None)
    RequestHints([], body).prompt()
    clean_body(body)


def at_the_neuron(dialect: str, body: bytes, model: TextModel, output: list[int]) -> None:
    request = PARSERS[dialect](body)
    with request.own_words():
        if dialect.startswith("count"):
            model.count_tokens(request, max_model_len=WINDOW)
            return
        choices = model.resolve(request, model.render(request, max_model_len=WINDOW), max_model_len=WINDOW)
    if request.turns:
        write_request(request)
    first = choices[0]
    projector = DIALECTS[dialect].Projector(request, response_id="resp_1", created=1, model="m")
    projector.begin(first.prompt.num_tokens)
    stream = model.event_stream(request, first.prompt, answer_id="a")
    events = stream.begin()
    for token in output:
        if stream.is_done:
            break
        events += stream.feed([token])
    for event in [*events, *stream.finish("length")]:
        projector.feed(event)
    if len(choices) == 1:
        projector.feed(Usage(1, 1))
        projector.end()


def refused(work: Callable[[], None]) -> ApiError | None:
    try:
        work()
    except ApiError as error:
        return error
    return None


def run(number: int, count: int, trying: Path) -> dict[str, float]:
    """How much of their budgets the greediest took, and how many examples gave a result."""
    worst = {"calls": 0.0, "bytes": 0.0, "results": 0.0, "refusals": 0.0}

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(requests(), TEMPLATE_SOURCES, OUTPUTS)
    def fuzz(asked: tuple[str, bytes], source: str, output: str) -> None:
        dialect, body = asked
        trying.write_bytes(json.dumps([dialect, source, output]).encode() + b"\n" + body)
        model = with_template(source)
        ids = model.tokenizer.encode(output)
        signal.setitimer(signal.ITIMER_PROF, KILL_CPU_S)
        for work, num_tokens in (
            (lambda: at_the_gateway(body), 0),
            (lambda: at_the_neuron(dialect, body, model, ids), len(ids)),
        ):
            with Spent() as spent:
                error = refused(work)
            calls = CALLS + CALLS_PER_BYTE * len(body) + CALLS_PER_TOKEN * num_tokens
            num_bytes = BYTES + BYTES_PER_BYTE * len(body) + BYTES_PER_TOKEN * num_tokens
            said = f"{dialect}, {len(body)} bytes, {num_tokens} tokens: {trying}"
            assert spent.calls <= calls, f"{spent.calls} calls, budget {calls}: {said}"
            assert spent.num_bytes <= num_bytes, f"{spent.num_bytes} bytes, budget {num_bytes}: {said}"
            if error is not None:
                assert error.status == 400, f"{error!r}: {said}"
                assert len(error.message) <= MAX_MESSAGE, f"{error.message[:200]}: {said}"
            worst["calls"] = max(worst["calls"], spent.calls / calls)
            worst["bytes"] = max(worst["bytes"], spent.num_bytes / num_bytes)
        signal.setitimer(signal.ITIMER_PROF, 0)
        worst["results" if error is None else "refusals"] += 1

    fuzz()
    return worst


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_ADDRESS_BYTES, MAX_ADDRESS_BYTES))
    checkpoint()
    gc.freeze()
    print(json.dumps(run(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))))

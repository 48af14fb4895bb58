"""Jobs of a text worker, and what of a request crosses the border."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
from cortex_core.conversation import Request
from neuron.daemon.prompt.model import TextModel
from neuron.daemon.text_workers.jobs import Jobs
from neuron.daemon.text_workers.messages import Done, Prepare, Prepared, decode_from_worker, encode_frame
from neuron.daemon.text_workers.served_text import unpacked

from tests.neuron.daemon.text_workers.checkpoints import chat, checkpoint


def model(tmp_path: Path) -> TextModel:
    return TextModel.load(checkpoint(tmp_path))


def prepared(tmp_path: Path, dialect: str, body: bytes) -> tuple[Request, Prepared, TextModel]:
    text = model(tmp_path)
    jobs = Jobs(text, drops_attribution=True, at=lambda stage: None)
    result = jobs.run(Prepare(dialect, 4096), body)  # type: ignore[arg-type]
    done = decode_from_worker(bytes(encode_frame(Done(result, "start", False)))[4:])
    assert isinstance(done, Done) and isinstance(done.result, Prepared)
    return msgspec.json.decode(done.result.request, type=Request), done.result, text


def test_choices_cross_as_they_were_resolved(tmp_path: Path) -> None:
    body = {
        "model": "m",
        "prompt": ["hello", "the weather"],
        "n": 3,
        "seed": 7,
        "max_tokens": 5,
        "logit_bias": {"17": -1.5},
        "echo": True,
        "logprobs": 2,
    }
    request, crossed, text = prepared(tmp_path, "completion", json.dumps(body).encode())
    from cortex_core.dialects import openai_completions

    original = openai_completions.parse(json.dumps(body).encode())
    expected = text.resolve(original, text.render(original), max_model_len=4096)
    assert unpacked(crossed, request.num_choices) == expected
    assert len(request.prompts) == 2 and not any(prompt.text for prompt in request.prompts)
    assert request.sampling == original.sampling


def test_numbers_of_any_size_in_a_schema_cross(tmp_path: Path) -> None:
    parameters = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 10**30}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    request, _, _ = prepared(tmp_path, "chat_completion", chat("hi", tools=tools))
    assert request.tools[0].parameters == parameters and not request.turns

"""What a body worker finds out is what would have been found out on the loop."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from cortex_core.errors import ApiError
from cortex_core.gateway_config import PromptFiltersSection
from cortex_gateway.bodies import jobs
from cortex_gateway.bodies.messages import Done, Facts, Read, Refused, Rename, Translate, decode_done, encode_message
from cortex_gateway.bodies.payload import Payload
from cortex_gateway.identity.estimate import asked_of
from cortex_gateway.placement.affinity import BLOCK_BYTES, MAX_BLOCKS, Affinity
from cortex_gateway.placement.session_hints import RequestHints
from cortex_gateway.surfaces.envelope import MAX_FIELDS, read_envelope, with_model
from cortex_gateway.translation.translation import ThroughChat, read_translation, translation_of
from hypothesis import given
from hypothesis import strategies as st

SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = [
    *("stream", "max_tokens", "max_completion_tokens", "max_output_tokens", "n", "best_of", "prompt", "messages"),
    *("system", "tools", "input", "metadata", "prompt_cache_key", "x"),
]
FIELDS = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=6)
MODELS = st.text(min_size=1, max_size=8)


def in_pieces(body: bytes, size: int) -> Payload:
    return Payload([body[start : start + size] for start in range(0, len(body), size)])


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """Members in any order, the model among them once or more often, white space anywhere."""
    members = [(name, json.dumps(value)) for name, value in draw(FIELDS).items()]
    members += [("model", json.dumps(draw(MODELS))) for _ in range(draw(st.integers(1, 2)))]
    space = draw(st.sampled_from(["", " ", "\n\t"]))
    parts = [
        f"{space}{json.dumps(name)}{space}:{space}{value}{space}" for name, value in draw(st.permutations(members))
    ]
    return ("{" + ",".join(parts) + "}").encode()


@given(bodies(), MODELS, st.integers(1, 40))
def test_H13_a_worker_finds_out_what_the_loop_would(body: bytes, name: str, size: int) -> None:
    try:
        envelope = read_envelope(body)
    except ApiError as refused:
        with pytest.raises(ApiError) as found:
            jobs.read(body)
        assert (found.value.message, found.value.param, found.value.code) == (
            refused.message,
            refused.param,
            refused.code,
        )
        return
    (facts,) = (decode_done(encode_message(Done(jobs.read(body)))[4:]).result,)
    assert isinstance(facts, Facts)
    hints = RequestHints([], body)
    assert (facts.model, facts.stream, facts.asked) == (envelope.model, envelope.stream, asked_of(body))
    assert (facts.session, facts.prompt) == (hints.session(), hints.prompt())
    renamed = with_model(body, name)
    assert json.loads(renamed)["model"] == name
    if facts.model_at is None:
        _, written = jobs.run(Rename(len(body), name), body)
    else:
        replaced = in_pieces(body, size).replaced(facts.model_at, msgspec.json.encode(name))
        written = b"".join(replaced.slices())
        assert replaced.num_bytes == len(written)
    assert written == renamed


def test_H13_as_much_of_a_prompt_comes_back_as_is_ever_compared() -> None:
    long = {"model": "m", "messages": [{"role": "user", "content": "some text " * 60_000}]}
    body = json.dumps(long).encode()
    facts = jobs.read(body)
    assert len(facts.prompt) == BLOCK_BYTES * MAX_BLOCKS
    affinity = Affinity()
    affinity.record("m", RequestHints([], body), "one")
    known = affinity.shares("m", RequestHints.known([], facts.session, facts.prompt))
    assert known.by_node == {"one": 1.0}
    named = RequestHints.known([(b"x-session-id", b"of the header")], "of the body", b"")
    assert named.session() == "of the header/"


SURFACES: dict[str, dict[str, Any]] = {
    "messages": {
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 9,
        "system": [{"type": "text", "text": "x-anthropic-billing-header: a"}],
        "tools": [{"name": "look", "description": "d", "input_schema": {"type": "object"}}],
        "stop_sequences": ["END"],
    },
    "responses": {
        "input": [{"role": "user", "content": "hi"}],
        "instructions": "be brief",
        "tools": [{"type": "function", "name": "look", "parameters": {"type": "object"}}],
        "metadata": {"a": "b"},
    },
    "count_tokens": {"messages": [{"role": "user", "content": "hi"}]},
    "responses_input_tokens": {"input": "hi"},
}


@pytest.mark.parametrize("name", SURFACES)
@pytest.mark.parametrize("extensions", [True, False])
def test_H13_a_worker_translates_as_the_loop_does(name: str, extensions: bool) -> None:
    surface = jobs.SURFACES[name]
    body = json.dumps({"model": "theirs", **SURFACES[name]}).encode()
    here = translation_of(surface, body, "theirs", PromptFiltersSection())
    job = Translate(len(body), name, "theirs", "ours", extensions=extensions, drops_attribution=True)
    result, written = jobs.run(job, body)
    assert written == here.body("ours", extensions=extensions) and result.num_bytes == len(written)
    came = decode_done(encode_message(Done(result))[4:]).result
    assert not isinstance(came, Facts | Refused) and hasattr(came, "request")
    there = read_translation(surface, came.request, "theirs")
    assert (there.label, there.path, there.dropped) == (here.label, here.path, here.dropped)
    if isinstance(here, ThroughChat) and isinstance(there, ThroughChat):
        chunks = [
            b'data: {"choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"id":"c1","function":{"name":"look",'
            b'"arguments":"{}"}}]}}]}\n\n',
            b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"tool_calls"}]}\n\ndata: [DONE]\n\n',
        ]
        answers = []
        for translation in (here, there):
            answer = translation.whole(is_events=True)
            for chunk in chunks:
                answer.feed(chunk)
            document = json.loads(answer.body())
            answers.append({key: value for key, value in document.items() if not key.endswith(("id", "_at"))})
        for answer in answers:
            for item in answer.get("output", ()):
                item.pop("id", None)
        # What it repeats of its tools is their names: the rest is the prompt's.
        assert answers[0].keys() == answers[1].keys()
        assert [answer.get("stop_reason") for answer in answers] == [answers[0].get("stop_reason")] * 2
        assert answers[0].get("content") == answers[1].get("content")
        assert answers[0].get("instructions") == answers[1].get("instructions")
        assert answers[0].get("tools") == answers[1].get("tools")


def test_H13_what_no_dialect_has_so_many_of_is_refused_with_the_number() -> None:
    body = json.dumps({**{f"k{number}": 0 for number in range(MAX_FIELDS)}, "model": "m"}).encode()
    with pytest.raises(ApiError) as refused:
        jobs.run(Read(len(body)), body)
    assert refused.value.code == "too_many_fields"
    assert refused.value.extras == {"fields": MAX_FIELDS + 1, "max_fields": MAX_FIELDS}
    assert str(MAX_FIELDS) in refused.value.message
    # Where it can be found at once, as mostly, it is; where it would have to be looked for, it is not.
    assert json.loads(with_model(body, "n"))["model"] == "n"
    with pytest.raises(ApiError):
        with_model(b'{"x": {"model": "not this one"}, ' + body[1:], "n")


def test_H13_what_an_answer_would_repeat_is_bounded() -> None:
    body = json.dumps({"model": "m", "input": "hi", "instructions": "x" * (2**20 + 1)}).encode()
    with pytest.raises(ApiError) as refused:
        jobs.run(Translate(len(body), "responses", "m", "m", extensions=True, drops_attribution=True), body)
    assert (refused.value.kind, refused.value.extras["max_bytes"]) == ("request_too_large", 2**20)

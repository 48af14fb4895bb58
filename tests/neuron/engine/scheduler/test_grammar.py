from __future__ import annotations

import json
import threading

import llguidance
import numpy as np
import pytest
from neuron.engine.errors import RequestError
from neuron.engine.scheduler.grammar import GrammarCompiler
from neuron.protocol import GrammarSpec, SamplingParams
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.neuron.engine.toy import GREEDY, VOCAB, Answers, ToyModel, request, run, toy_engine

STOP = 100
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "ok": {"type": "boolean"}},
    "required": ["a", "ok"],
    "additionalProperties": False,
}


def tokenizer_json() -> str:
    """Printable ASCII as single tokens, plus the end token: fits the toy's vocabulary of 101."""
    vocab = {chr(code): code - 33 for code in range(33, 127)}
    vocab |= {"Ġ": 94, "Ċ": 95, "true": 96, "false": 97, '":': 98, "12": 99}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    assert tokenizer.token_to_id("<|end|>") == STOP
    return tokenizer.to_str()


TOKENIZER = tokenizer_json()


def text_of(tokens: list[int]) -> str:
    return Tokenizer.from_str(TOKENIZER).decode(tokens)


def grammar_of(schema) -> GrammarSpec:
    overrides = {"whitespace_flexible": False}
    return GrammarSpec(llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=overrides))


def serve(engine, *requests) -> Answers:
    """Like `run`, but waits without spinning while grammars compile."""
    answers = Answers()
    wake = threading.Event()
    engine.on_wake = wake.set
    for item in requests:
        engine.add(item)
    while not engine.is_idle:
        output = engine.step()
        if output is None:
            assert wake.wait(20)
            wake.clear()
        else:
            answers.take(output)
    assert engine.check() == []
    return answers


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=1.5, seed=3), SamplingParams(top_p=0.9)])
def test_output_obeys_the_grammar_and_ends_with_it(sampling):
    engine = toy_engine(tokenizer_json=TOKENIZER)
    answers = serve(
        engine,
        *(
            request(number, [number, 5, 6], 40, sampling=sampling, grammar=grammar_of(SCHEMA), stop_token_ids=(STOP,))
            for number in range(4)
        ),
        request(9, [1, 2, 3], 6),
    )
    for number in range(4):
        value = json.loads(text_of(answers.tokens[number]))
        assert set(value) == {"a", "ok"} and 0 <= value["a"] <= 99
        assert answers.finish[number] == "grammar"
    assert answers.tokens[9] == run(toy_engine(), request(9, [1, 2, 3], 6)).tokens[9]


def test_a_stop_token_is_admitted_exactly_where_the_grammar_may_end():
    compiler = GrammarCompiler(TOKENIZER, VOCAB)
    state = compiler.compile("start: /[0-9]+/", frozenset({7}), [])
    row = np.zeros(compiler.num_mask_words, dtype=np.int32)

    def admitted() -> set[int]:
        state.fill_mask(row)
        return set(np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist())

    digits = {ord(digit) - 33 for digit in "0123456789"} | {99}
    assert admitted() == digits
    assert not state.advance(ord("4") - 33)
    # The tokenizer's own end token is not among this request's stop tokens, 7 is.
    assert admitted() == digits | {7}


def test_stop_token_after_a_grammar_that_may_go_on_is_a_stop():
    model = ToyModel()
    engine = toy_engine(model, tokenizer_json=TOKENIZER)

    def prefer_stop(logits):
        logits[:, STOP] += 50.0
        return logits

    model.on_logits = prefer_stop
    answers = serve(engine, request(0, [1], 20, grammar=GrammarSpec("start: /[0-9]+/"), stop_token_ids=(STOP,)))
    assert answers.finish[0] == "stop"
    assert len(answers.tokens[0]) == 1 and text_of(answers.tokens[0]).isdigit()


@pytest.mark.parametrize("grammar", ["start: undefined_rule", "garbage{{", ""])
def test_an_invalid_grammar_fails_its_request_alone(grammar):
    engine = toy_engine(tokenizer_json=TOKENIZER)
    answers = serve(engine, request(0, [1, 2], 3, grammar=GrammarSpec(grammar)), request(1, [3, 4], 3))
    assert answers.failures[0].kind == "invalid_grammar"
    assert answers.failures[0].message
    assert answers.finish[1] == "length"


def test_without_a_tokenizer_grammars_are_refused():
    answers = serve(toy_engine(), request(0, [1, 2], 3, grammar=grammar_of(SCHEMA)))
    assert answers.failures[0].kind == "invalid_grammar"


def test_a_vocabulary_padded_beyond_the_tokenizer_is_masked_to_its_end():
    compiler = GrammarCompiler(TOKENIZER, 160)
    state = compiler.compile('start: "ab"', frozenset(), [])
    row = np.full(compiler.num_mask_words, -1, dtype=np.int32)
    state.fill_mask(row)
    assert np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist() == [ord("a") - 33]
    with pytest.raises(RequestError, match="only 90"):
        GrammarCompiler(TOKENIZER, 90).compile('start: "ab"', frozenset(), [])


def test_a_resumed_answer_continues_in_its_grammar():
    sampling = SamplingParams(temperature=1.0, seed=11)
    fields = {"sampling": sampling, "grammar": grammar_of(SCHEMA), "stop_token_ids": (STOP,)}
    whole = serve(toy_engine(tokenizer_json=TOKENIZER), request(0, [1, 2], 40, **fields)).tokens[0]
    for cut in (1, 5, len(whole) - 1):
        rest = serve(
            toy_engine(tokenizer_json=TOKENIZER), request(0, [1, 2], 40, output_ids=tuple(whole[:cut]), **fields)
        )
        assert rest.tokens[0] == whole[cut:]
    complete = serve(toy_engine(tokenizer_json=TOKENIZER), request(0, [1, 2], 40, output_ids=tuple(whole), **fields))
    assert complete.finish[0] == "grammar" and complete.tokens[0] == []
    wrong = serve(toy_engine(tokenizer_json=TOKENIZER), request(0, [1, 2], 40, output_ids=(0,), **fields))
    assert wrong.failures[0].kind == "invalid_grammar"


def test_cancelling_while_the_grammar_compiles_leaves_nothing():
    engine = toy_engine(tokenizer_json=TOKENIZER)
    woken = threading.Event()
    engine.on_wake = woken.set
    engine.add(request(0, [1], 5, grammar=grammar_of(SCHEMA)))
    engine.cancel(0)
    assert woken.wait(20)
    output = engine.step()
    assert output.updates == [] and output.failures == []
    assert engine.is_idle and engine.check() == []


def test_choices_of_a_request_share_what_was_compiled(monkeypatch):
    """128 of them compiled the same grammar 128 times, on two threads, and everybody else's waited."""
    made = []
    matcher = llguidance.LLMatcher
    grammars = [grammar_of({**SCHEMA, "title": f"{number}"}).grammar for number in range(6)]
    monkeypatch.setattr(llguidance, "LLMatcher", lambda *args, **kw: made.append(args[1]) or matcher(*args, **kw))
    compiler = GrammarCompiler(TOKENIZER, VOCAB)
    states = [compiler.compile(grammars[0], frozenset({STOP}), []) for _ in range(20)]
    assert made == grammars[:1]
    row = np.zeros(compiler.num_mask_words, dtype=np.int32)
    fresh = row.copy()
    states[1].fill_mask(fresh)
    for token in [ord("{") - 33, ord('"') - 33]:
        states[0].advance(token)
    states[1].fill_mask(row)
    assert (row == fresh).all(), "each is where it is"
    for grammar in grammars:
        compiler.compile(grammar, frozenset({STOP}), [])
    assert len(compiler._kept) < len(grammars)

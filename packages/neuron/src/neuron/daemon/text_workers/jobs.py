"""Jobs of a text worker: a body of bytes in, plain data out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from cortex_core.conversation import RawPrompt, Request
from cortex_core.dialects import openai_chat, openai_completions, openai_responses
from cortex_core.dialects.anthropic_messages import MessagesDialect
from cortex_core.dialects.json_body import Fields, decode_object, missing, wrong_type
from cortex_core.errors import ApiError, invalid

from neuron.daemon.prompt.model import TextModel
from neuron.daemon.text import limits
from neuron.daemon.text.prompts import Choice
from neuron.daemon.text_workers.messages import (
    Answer,
    Count,
    Counted,
    DialectRoute,
    Prepare,
    Prepared,
    PreparedPrompt,
    Result,
    Stage,
    Tokenize,
    Work,
)

_encode = msgspec.json.Encoder().encode
Parse = Callable[[bytes], Request]


class Jobs:
    """The work on one model. at: told of each stage as it begins."""

    def __init__(self, model: TextModel, *, drops_attribution: bool, at: Callable[[Stage], None]) -> None:
        messages = MessagesDialect(drops_attribution=drops_attribution)
        self._model = model
        self._at = at
        self._parse: dict[DialectRoute, Parse] = {
            "chat_completion": openai_chat.parse,
            "responses": openai_responses.parse,
            "messages": messages.parse,
            "completion": openai_completions.parse,
        }
        self._parse_count: dict[str, Parse] = {
            "messages": messages.parse_count_tokens,
            "responses": openai_responses.parse_input_tokens,
        }

    def run(self, work: Work, body: bytes) -> Result:
        """Raises `ApiError`, in the client's own words."""
        if isinstance(work, Prepare):
            return self._prepare(work, body)
        if isinstance(work, Count):
            return self._count(work, body)
        if isinstance(work, Tokenize):
            return self._tokenize(work, body)
        return self._detokenize(body)

    def _prepare(self, work: Prepare, body: bytes) -> Prepared:
        request = self._parse[work.dialect](body)
        with request.own_words():
            self._at("prompt" if request.prompts else "messages")
            prompts = self._model.render(request, max_model_len=work.max_model_len)
            self._at("grammar")
            choices = self._model.resolve(request, prompts, max_model_len=work.max_model_len)
        return packed(request, choices)

    def _count(self, work: Count, body: bytes) -> Counted:
        request = self._parse_count[work.dialect](body)
        self._at("messages")
        with request.own_words():
            return Counted(self._model.count_tokens(request, max_model_len=work.max_model_len))

    def _tokenize(self, work: Tokenize, body: bytes) -> Answer:
        """`{model, prompt, add_special_tokens?}` or a chat request: `{count, max_model_len, tokens, token_strs?}`."""
        fields = decode_object(body)
        shows_strings = fields.boolean("return_token_strs")
        ids = self._tokenized(fields, work, body)
        answer: dict[str, Any] = {"count": len(ids), "max_model_len": work.max_model_len, "tokens": ids}
        if shows_strings:
            table = self._model.tokenizer.table
            answer["token_strs"] = [table.token_text(token_id) for token_id in ids]
        return Answer(_encode(answer))

    def _tokenized(self, fields: Fields, work: Tokenize, body: bytes) -> list[int]:
        if fields.has("messages"):
            request = openai_chat.parse(body)
            self._at("messages")
            with request.own_words():
                (prompt,) = self._model.render(
                    request, max_model_len=work.max_model_len, windows=limits.COUNTED_WINDOWS
                )
            return prompt.token_ids
        if not fields.has("prompt"):
            raise missing("prompt")
        raw = fields.required_string("prompt", may_be_empty=True)
        self._at("prompt")
        adds_special = fields.boolean("add_special_tokens", True)
        most, windows = work.max_model_len, limits.COUNTED_WINDOWS
        if not adds_special or not raw:
            return self._model.encode(raw, max_model_len=most, windows=windows)
        alone = Request(model="", prompts=(RawPrompt(text=raw),))
        (prompt,) = self._model.render(alone, max_model_len=most, windows=windows)
        return prompt.token_ids

    def _detokenize(self, body: bytes) -> Answer:
        """`{model, tokens}`: `{prompt}`."""
        fields = decode_object(body)
        ids = _token_ids(fields, self._model.tokenizer.vocab_size)
        self._at("prompt")
        return Answer(_encode({"prompt": self._model.tokenizer.decode(ids)}))


def packed(request: Request, choices: list[Choice]) -> Prepared:
    """What is the same in all choices, once. There is at least one choice."""
    firsts = choices[:: request.num_choices]
    head = msgspec.structs.replace(request, turns=(), prompts=(RawPrompt(),) * len(request.prompts))
    return Prepared(
        request=_encode(head),
        prompts=[
            PreparedPrompt(
                token_ids=choice.prompt.token_ids,
                text=choice.prompt.text if request.echo else "",
                is_chat=choice.prompt.is_chat,
                reasoning=choice.prompt.reasoning,
                max_tokens=choice.max_tokens,
                stop_token_ids=choice.stop_token_ids,
                grammar=choice.grammar,
            )
            for choice in firsts
        ],
        sampling=choices[0].sampling,
        seeds=[choice.sampling.seed for choice in choices],
        prompt_logprobs=choices[0].prompt_logprobs,
    )


def _token_ids(fields: Fields, vocab_size: int) -> list[int]:
    tokens = fields.get("tokens")
    if tokens is None:
        raise missing("tokens")
    if type(tokens) is not list:
        raise wrong_type("tokens", "an array", tokens)
    for index, token in enumerate(tokens):
        if type(token) is not int and not (type(token) is float and token.is_integer()):
            raise wrong_type(f"tokens[{index}]", "an integer", token)
        if not 0 <= token < vocab_size:
            raise _not_in_vocabulary(index, int(token), vocab_size)
    return [int(token) for token in tokens]


def _not_in_vocabulary(index: int, token: int, vocab_size: int) -> ApiError:
    return invalid(f"tokens[{index}]: {token} is not in the vocabulary (0 to {vocab_size - 1})", param="tokens")

"""Counting and tokenising: the renderer of prefill and the tokenizer, never the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cortex_core.conversation import RawPrompt, Request
from cortex_core.dialects import anthropic_messages, openai_chat, openai_responses
from cortex_core.dialects.anthropic_messages import MessagesDialect
from cortex_core.dialects.json_body import Fields, decode_object, missing, wrong_type
from cortex_core.errors import ApiError, invalid

from neuron.api.exchange import Exchange
from neuron.api.inference import LONG_BODY_BYTES
from neuron.api.services import Services
from neuron.text.model import TextModel


class Tokens:
    """Handlers of the counting routes, `/tokenize` and `/detokenize`. They serve while an engine recovers, too."""

    def __init__(self, services: Services, messages: MessagesDialect) -> None:
        self._services = services
        self._messages = messages

    async def count(self, exchange: Exchange) -> None:
        """Anthropic's count: what `/v1/messages` will report as its input."""
        await self._count(exchange, self._messages.parse_count_tokens, anthropic_messages.count_tokens_body)

    async def count_input(self, exchange: Exchange) -> None:
        """OpenAI's count: what `/v1/responses` will report as its input."""
        await self._count(exchange, openai_responses.parse_input_tokens, openai_responses.input_tokens_body)

    async def _count(
        self, exchange: Exchange, parse: Callable[[bytes], Request], render: Callable[[int], bytes]
    ) -> None:
        body = await exchange.read_body()

        def work() -> int:
            request = parse(body)
            with request.own_words():
                return self._text(exchange, request.model).count_tokens(request)

        async with exchange.watched():
            counted = await self._services.off_loop(work, is_long=len(body) >= LONG_BODY_BYTES)
            await exchange.respond(200, render(counted))

    async def tokenize(self, exchange: Exchange) -> None:
        """`{model, prompt, add_special_tokens?}` or a chat request: `{count, max_model_len, tokens, token_strs?}`."""
        body = await exchange.read_body()

        def work() -> dict[str, Any]:
            fields = decode_object(body)
            model_id = exchange.resolved_model or fields.model_name()
            shows_strings = fields.boolean("return_token_strs")
            text = self._services.manager.text_of(model_id)
            ids = _tokenized(text, fields, body)
            model = self._services.manager.find(model_id)
            answer: dict[str, Any] = {
                "count": len(ids),
                "max_model_len": model.max_model_len if model is not None else 0,
                "tokens": ids,
            }
            if shows_strings:
                answer["token_strs"] = [text.tokenizer.token_text(token_id) for token_id in ids]
            return answer

        async with exchange.watched():
            await exchange.respond_json(await self._services.off_loop(work, is_long=len(body) >= LONG_BODY_BYTES))

    async def detokenize(self, exchange: Exchange) -> None:
        """`{model, tokens}`: `{prompt}`."""
        body = await exchange.read_body()

        def work() -> dict[str, str]:
            fields = decode_object(body)
            text = self._text(exchange, fields.model_name())
            return {"prompt": text.tokenizer.decode(_token_ids(fields, text.tokenizer.vocab_size))}

        async with exchange.watched():
            await exchange.respond_json(await self._services.off_loop(work, is_long=len(body) >= LONG_BODY_BYTES))

    def _text(self, exchange: Exchange, model: str) -> TextModel:
        return self._services.manager.text_of(exchange.resolved_model or model)


def _tokenized(text: TextModel, fields: Fields, body: bytes) -> list[int]:
    if fields.has("messages"):
        (prompt,) = text.render(openai_chat.parse(body))
        return prompt.token_ids
    if not fields.has("prompt"):
        raise missing("prompt")
    raw = fields.required_string("prompt", may_be_empty=True)
    if not fields.boolean("add_special_tokens", True) or not raw:
        return text.tokenizer.encode(raw)
    (prompt,) = text.render(Request(model="", prompts=(RawPrompt(text=raw),)))
    return prompt.token_ids


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

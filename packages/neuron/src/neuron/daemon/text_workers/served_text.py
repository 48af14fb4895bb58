"""A model's text as the daemon serves it: requests go to the workers, output ids become events here."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import msgspec
from cortex_core.conversation import Request

from neuron.daemon.output.event_stream import EventStream
from neuron.daemon.text.prompts import Choice, Prompt
from neuron.daemon.text.token_table import TokenTable
from neuron.daemon.text_workers.messages import (
    Answer,
    Count,
    Counted,
    Detokenize,
    DialectRoute,
    Prepare,
    Prepared,
    TextInfo,
    Tokenize,
)
from neuron.daemon.text_workers.pool import TextPool
from neuron.daemon.text_workers.settings import TextSettings
from neuron.daemon.text_workers.worker_handle import LostReason

_decode_request = msgspec.json.Decoder(Request).decode


class ServedText:
    """What `open` returns; `close` it. All results of the workers raise `ApiError` as `TextPool.run` does.

    tokenizer_json: the fast tokenizer's serialised form, for `EngineConfig.tokenizer_json`.
    """

    def __init__(self, info: TextInfo, pool: TextPool) -> None:
        self.pool = pool
        self.tokens = TokenTable(info.token_bytes, info.special_ids, strips_leading_space=info.strips_leading_space)
        self.tokenizer_json = info.tokenizer_json
        self.renders_tools = info.renders_tools
        self.can_reason = info.can_reason
        self._reasoning = info.reasoning
        self._tool_calls = info.tool_calls
        self._uses_xml_calls = info.uses_xml_calls

    @classmethod
    async def open(
        cls,
        path: str,
        settings: TextSettings,
        *,
        label: str,
        on_end: Callable[[LostReason], None] = lambda reason: None,
    ) -> ServedText:
        """Read a checkpoint's tokenizer and template in a process of its own. Raises `TextLoadError`."""
        pool = TextPool(path, settings, label=label, on_end=on_end)
        return cls(await pool.open(), pool)

    async def close(self) -> None:
        await self.pool.close()

    async def prepare(
        self, dialect: DialectRoute, body: bytes, *, max_model_len: int, principal: str | None
    ) -> tuple[Request, list[Choice]]:
        """The request, without its messages, and its choices, prompt-major."""
        prepared = cast(Prepared, await self.pool.run(Prepare(dialect, max_model_len), body, principal=principal))
        request = _decode_request(prepared.request)
        return request, unpacked(prepared, request.num_choices)

    async def count(self, work: Count, body: bytes, *, principal: str | None) -> int:
        """Prompt tokens as they will be billed."""
        return cast(Counted, await self.pool.run(work, body, principal=principal)).num_tokens

    async def answer(self, work: Tokenize | Detokenize, body: bytes, *, principal: str | None) -> bytes:
        """The body of an answer."""
        return cast(Answer, await self.pool.run(work, body, principal=principal)).body

    def event_stream(self, request: Request, prompt: Prompt, choice: int = 0, *, answer_id: str = "") -> EventStream:
        """A fresh stream for one choice; answer_id is that of the answer it is part of."""
        return EventStream(
            self.tokens,
            self._reasoning,
            self._tool_calls,
            request,
            prompt,
            choice,
            answer_id=answer_id,
            bare_function=self._uses_xml_calls,
        )


def unpacked(prepared: Prepared, num_choices: int) -> list[Choice]:
    """The choices that were packed; those of one prompt share it."""
    replace = msgspec.structs.replace
    choices: list[Choice] = []
    for part in prepared.prompts:
        prompt = Prompt(part.token_ids, part.text, part.is_chat, part.reasoning)
        for _ in range(num_choices):
            seed = prepared.seeds[len(choices)]
            choices.append(
                Choice(
                    choice=len(choices),
                    prompt=prompt,
                    sampling=replace(prepared.sampling, seed=seed),
                    max_tokens=part.max_tokens,
                    stop_token_ids=part.stop_token_ids,
                    grammar=part.grammar,
                    prompt_logprobs=prepared.prompt_logprobs,
                )
            )
    return choices

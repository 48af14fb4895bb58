"""The internal request: what every dialect parses into and every renderer reads.

A request is turns of typed parts, tools, constraints, limits, sampling and a reasoning mode. Nothing in here
names a vendor. `None` always means "the client did not say": the neuron then takes the model's own default.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import msgspec

from cortex_core.errors import ApiError

Role = Literal["system", "user", "assistant", "tool"]


class TextPart(msgspec.Struct, frozen=True, tag="text"):
    """Text of a message."""

    text: str


class ImagePart(msgspec.Struct, frozen=True, tag="image"):
    """An image by value (`data`, base64 text as the client sent it) or by reference (`url`)."""

    data: str | None = None
    media_type: str | None = None
    url: str | None = None
    detail: str | None = None


class ThinkingPart(msgspec.Struct, frozen=True, tag="thinking"):
    """Reasoning of an earlier assistant turn; `signature` is opaque and comes back unverified."""

    text: str
    signature: str | None = None


class ToolCallPart(msgspec.Struct, frozen=True, tag="tool_call"):
    """A call made by the assistant. `arguments` is JSON text; it may be malformed if a client replays it so."""

    id: str
    name: str
    arguments: str


class ToolResultPart(msgspec.Struct, frozen=True, tag="tool_result"):
    """Answer of a tool to the call `call_id`. `name` is the tool's, where the client says it."""

    call_id: str
    content: tuple[TextPart | ImagePart, ...] = ()
    is_error: bool = False
    name: str | None = None


Part = TextPart | ImagePart | ThinkingPart | ToolCallPart | ToolResultPart


class Turn(msgspec.Struct, frozen=True):
    """One message. `tool` turns hold only `ToolResultPart`s; `assistant` turns text, thinking and tool calls."""

    role: Role
    parts: tuple[Part, ...] = ()

    def text(self) -> str:
        """All text parts, concatenated without a separator."""
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))


class ToolDefinition(msgspec.Struct, frozen=True):
    """A tool as the model sees it: a name, and a JSON object of arguments.

    is_freeform: the client knows a tool that takes one text; the model sees one string argument, `input`.
    namespace, member: the client knows the tool as `member` of `namespace`; `name` is the two made one.
    """

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool = False
    is_freeform: bool = False
    namespace: str | None = None
    member: str | None = None


class ToolChoice(msgspec.Struct, frozen=True):
    """`named` goes with `name`; `allowed` (when not None) narrows `auto` and `required` to these names."""

    mode: Literal["auto", "none", "required", "named"] = "auto"
    name: str | None = None
    allowed: tuple[str, ...] | None = None


class ResponseFormat(msgspec.Struct, frozen=True):
    """`json_object`: any JSON object. `json_schema`: text that validates against `schema`."""

    kind: Literal["json_object", "json_schema"]
    schema: dict[str, Any] | bool | None = None
    name: str | None = None
    strict: bool | None = None


class Sampling(msgspec.Struct, frozen=True):
    """Sampling as the client asked for it; unset fields come from the model's generation_config."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] = {}
    seed: int | None = None


class Limits(msgspec.Struct, frozen=True):
    """`max_tokens` counts every generated token, reasoning included; it is clamped to the window, never refused."""

    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


class Reasoning(msgspec.Struct, frozen=True):
    """How much to think, and whether the client sees it.

    mode: `default` leaves it to the model's template. visible: project reasoning to the client at all.
    omit_text: announce the reasoning block but leave its text empty (Anthropic `display: omitted`).
    """

    mode: Literal["default", "on", "off"] = "default"
    effort: str | None = None
    budget_tokens: int | None = None
    visible: bool = True
    omit_text: bool = False


class RawPrompt(msgspec.Struct, frozen=True):
    """A completion prompt: text or token ids, no chat template."""

    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    suffix: str | None = None


class Request(msgspec.Struct, frozen=True):
    """One inference request, whatever the dialect.

    Exactly one of `turns` and `prompts` is non-empty. `num_choices` is `n`; with several prompts there are
    `len(prompts) * num_choices` choices, prompt-major. `logprobs`: None is off, k >= 0 asks for the sampled
    token's log-probability and the k most likely alternatives. `continue_final_turn`: the last assistant turn
    is a prefix to continue (Anthropic prefill).

    cache_salt: requests with different ones share no cached prefix. The last three are no part of what is asked.
    param_names: fields as this module calls them (`messages`), by the
    path that the client wrote them at, where that differs. dropped: names of the filters that took something out of
    the prompt. echo_fields: what the dialect that parsed the request repeats in its answer; nobody else reads it.
    """

    model: str
    turns: tuple[Turn, ...] = ()
    prompts: tuple[RawPrompt, ...] = ()
    tools: tuple[ToolDefinition, ...] = ()
    tool_choice: ToolChoice = ToolChoice()
    parallel_tool_calls: bool = True
    response_format: ResponseFormat | None = None
    sampling: Sampling = Sampling()
    limits: Limits = Limits()
    reasoning: Reasoning = Reasoning()
    num_choices: int = 1
    logprobs: int | None = None
    echo: bool = False
    stream: bool = False
    include_usage: bool = False
    continue_final_turn: bool = False
    template_kwargs: dict[str, Any] = {}
    cache_salt: str = ""
    param_names: dict[str, str] = {}
    dropped: tuple[str, ...] = ()
    echo_fields: dict[str, Any] = {}

    def client_param(self, param: str | None) -> str | None:
        """An error's `param` in the client's own words."""
        return None if param is None else self.param_names.get(param, param)

    @contextmanager
    def own_words(self) -> Iterator[None]:
        """An `ApiError` raised inside names the field as the client does."""
        try:
            yield
        except ApiError as error:
            error.param = self.client_param(error.param)
            raise

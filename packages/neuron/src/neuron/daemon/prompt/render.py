"""A request becomes prompts: the one path that prefill, `count_tokens` and `/tokenize` share."""

from __future__ import annotations

import logging
from typing import Any

from cortex_core.conversation import RawPrompt, Request, TextPart, ToolCallPart, ToolResultPart, Turn
from cortex_core.errors import ApiError, invalid, prompt_too_long

from neuron.daemon.prompt.chat_template import ChatTemplate, TemplateRenderError, chatml
from neuron.daemon.prompt.messages import Message, messages_of, tools_of, variants
from neuron.daemon.prompt.tokenizer import Tokenizer, UntokenizableText
from neuron.daemon.text import limits
from neuron.daemon.text.markers import MarkerPair
from neuron.daemon.text.prompts import Prompt, ReasoningState, offered_tools

logger = logging.getLogger(__name__)

# (prefix, suffix, middle) markers of fill-in-the-middle models; the flag says that the suffix comes first and the
# prefix last, with nothing after it.
_FIM_MARKERS: tuple[tuple[str, str, str, bool], ...] = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", False),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>", False),
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>", False),
    ("<PRE>", "<SUF>", "<MID>", False),
    ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>", False),
    ("[PREFIX]", "[SUFFIX]", "", True),
)


class _Window:
    """What a text may have to be looked at. max_model_len: None where it is not known."""

    def __init__(self, max_model_len: int | None, windows: int, longest_token_bytes: int) -> None:
        self._max_tokens = max_model_len or limits.ASSUMED_WINDOW
        self._most = self._max_tokens * windows
        self._longest_token_bytes = longest_token_bytes
        self._max_bytes = min(self._most * longest_token_bytes, self._max_tokens * limits.MAX_BYTES_PER_TOKEN)

    def check_text(self, text: str, param: str) -> None:
        """Megabytes take seconds to tokenise: what cannot fit is known from its size alone."""
        if 4 * len(text) > self._max_bytes:
            self.check_bytes(len(text.encode("utf-8", "replace")), param)

    def check_bytes(self, num_bytes: int, param: str) -> None:
        if num_bytes > self._max_bytes:
            at_least = num_bytes // min(self._longest_token_bytes, limits.MAX_BYTES_PER_TOKEN)
            raise prompt_too_long(max(at_least, self._max_tokens + 1), self._max_tokens, param=param)

    def check_ids(self, count: int, param: str) -> None:
        if count > self._most:
            raise prompt_too_long(count, self._max_tokens, param=param)


class Renderer:
    """Renders requests for one model. Thread-safe: it only reads what it was built with."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, reasoning: MarkerPair | None) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._reasoning = reasoning
        self._fim = _find_fim(tokenizer)

    def render(self, request: Request, max_model_len: int | None = None, *, windows: int = 1) -> list[Prompt]:
        """One prompt for a conversation, one per raw prompt of a completion.

        max_model_len, windows: a text that is sure to be longer than so many windows, in tokens, is refused before it
        is rendered or tokenised. Raises `ApiError`: `vision_unsupported`, `template_render_failed`,
        `context_length_exceeded`, a raw prompt with ids that do not exist, a suffix on a model that cannot fill in the
        middle.
        """
        window = _Window(max_model_len, windows, self._tokenizer.longest_token_bytes)
        if request.prompts:
            count = len(request.prompts)
            return [self._raw(prompt, index, count, window) for index, prompt in enumerate(request.prompts)]
        return [self._chat(request, window)]

    def encode(self, text: str, max_model_len: int | None, *, windows: int = 1, param: str = "prompt") -> list[int]:
        """Ids of a text alone. Raises `ApiError` as `render` does; param: the field that it names."""
        return self._encode(text, _Window(max_model_len, windows, self._tokenizer.longest_token_bytes), param)

    def _encode(self, text: str, window: _Window, param: str) -> list[int]:
        window.check_text(text, param)
        try:
            return self._tokenizer.encode(text)
        except UntokenizableText as exc:
            logger.warning("the tokenizer gave up on a text of %d characters: %s", len(text), exc)
            raise invalid(
                f"{param}: the model's tokenizer cannot split this text of {len(text)} characters ({exc})", param=param
            ) from exc

    # ------------------------------------------------------------ chat

    def _chat(self, request: Request, window: _Window) -> Prompt:
        turns = request.turns
        window.check_bytes(_bytes_said(turns), "messages")
        if request.continue_final_turn and turns and turns[-1].role == "assistant" and not turns[-1].parts:
            turns = turns[:-1]  # an empty beginning is no beginning
        messages = messages_of(turns, request.model)
        if not messages:
            raise invalid("messages: at least one message is required", param="messages")
        tools = tools_of(offered_tools(request))
        prefix = self._prefix_of(request)
        text = self._rendered(request, messages, tools, prefix)
        state: ReasoningState = "none"
        if self._reasoning is not None:
            text, state = self._reasoning_state(request, self._reasoning, text, prefix)
        ids = self._encode(text, window, "messages")
        bos = list(self._tokenizer.bos_ids)
        if not self._template.has_template and bos and ids[: len(bos)] != bos:
            ids = bos + ids  # a template writes its own beginning; plain ChatML does not
        return Prompt(token_ids=ids or self._document_start("messages"), text=text, reasoning=state)

    def _prefix_of(self, request: Request) -> str | None:
        """The text of a final assistant turn that is to be continued, None if there is nothing to continue."""
        if not request.continue_final_turn or not request.turns or request.turns[-1].role != "assistant":
            return None
        return request.turns[-1].text() or None

    def _rendered(self, request: Request, messages: list[Message], tools: list[Message], prefix: str | None) -> str:
        if tools and not self._template.renders_tools:
            raise _render_failed("the chat template of this model cannot present tools to it")
        variables = self._variables(request)
        failure: TemplateRenderError | None = None
        for candidate in variants(messages, keeps_inner_system=self._template.keeps_inner_system):
            try:
                return self._render_one(candidate, tools, prefix, variables)
            except TemplateRenderError as exc:
                failure = failure or exc
        if tools:
            # without its tools the model would answer in prose, and the client would not know why (N18)
            raise _render_failed(f"the chat template refused this conversation: {failure}")
        logger.warning("the chat template refused a conversation, plain ChatML is used: %s", failure)
        if prefix is not None:
            return chatml(messages[:-1]) + prefix
        return chatml(messages)

    def _render_one(
        self, messages: list[Message], tools: list[Message], prefix: str | None, variables: dict[str, Any]
    ) -> str:
        if prefix is None or messages[-1]["role"] != "assistant" or "tool_calls" in messages[-1]:
            return self._template.render(messages, tools=tools, variables=variables)
        # A stand-in shows where the template puts the content; whatever it adds after that is cut off.
        stand_in = "\u27e6continue-here\u27e7"
        marked = [*messages[:-1], {**messages[-1], "content": stand_in}]
        text = self._template.render(marked, tools=tools, add_generation_prompt=False, variables=variables)
        at = text.rfind(stand_in)
        if at < 0:
            return self._template.render(messages[:-1], tools=tools, variables=variables) + prefix
        return text[:at] + prefix

    def _variables(self, request: Request) -> dict[str, Any]:
        """Template variables: the reasoning mode under the names that templates use, then the client's own."""
        variables: dict[str, Any] = {}
        reasoning = request.reasoning
        if reasoning.mode != "default" or not reasoning.visible:
            # thinking that nobody will see only eats the budget (N20); an explicit wish still wins
            variables["enable_thinking"] = variables["thinking"] = reasoning.mode == "on"
        if reasoning.effort is not None and reasoning.effort != "none":
            variables["reasoning_effort"] = reasoning.effort
        return variables | request.template_kwargs

    def _reasoning_state(
        self, request: Request, pair: MarkerPair, text: str, prefix: str | None
    ) -> tuple[str, ReasoningState]:
        if prefix is not None:
            return text, "open" if prefix.rfind(pair.open) > prefix.rfind(pair.close) else "none"
        tail = text.rstrip()
        if tail.endswith(pair.open):
            if self._thinks(request) is False:
                # the template opens a block whatever it is told: close it, so that the answer comes at once
                return f"{tail}\n\n{pair.close}\n\n", "none"
            return text, "open"
        if tail.endswith(pair.close) or self._thinks(request) is False:
            return text, "none"
        return text, "possible" if pair.open in self._template.all_sources else "none"

    def _thinks(self, request: Request) -> bool | None:
        """What the request says about thinking; None when it leaves it to the template."""
        explicit = request.template_kwargs.get("enable_thinking", request.template_kwargs.get("thinking"))
        if isinstance(explicit, bool):
            return explicit
        if request.reasoning.mode != "default":
            return request.reasoning.mode == "on"
        return None if request.reasoning.visible else False

    # ------------------------------------------------------------ raw prompts

    def _raw(self, prompt: RawPrompt, index: int, count: int, window: _Window) -> Prompt:
        param = "prompt" if count == 1 else f"prompt[{index}]"
        tokenizer = self._tokenizer
        if prompt.token_ids is not None:
            window.check_ids(len(prompt.token_ids), param)
            ids = list(prompt.token_ids)
            wrong = next((i for i in ids if not 0 <= i < tokenizer.vocab_size), None)
            if wrong is not None:
                last = tokenizer.vocab_size - 1
                raise invalid(f"token id {wrong} is not in the vocabulary (0 to {last})", param=param)
            text = tokenizer.decode(ids)
        else:
            text = prompt.text or ""
            ids = self._encode(text, window, param)
        if prompt.suffix:
            ids = self._fill_in_the_middle(ids, prompt.suffix, window)
        bos = list(tokenizer.bos_ids)
        if prompt.token_ids is None and bos and ids[: len(bos)] != bos:
            ids = bos + ids
        return Prompt(token_ids=ids or self._document_start(param), text=text, is_chat=False)

    def _document_start(self, param: str) -> list[int]:
        """What a prompt of nothing starts from, as with the original API: the beginning of a document."""
        special = self._tokenizer.special_tokens
        for token in (special.get("bos_token", ""), "<|endoftext|>", special.get("eos_token", "")):
            token_id = self._tokenizer.token_id(token) if token else None
            if token_id is not None:
                return [token_id]
        raise invalid("the prompt is empty", param=param)

    def _fill_in_the_middle(self, ids: list[int], suffix: str, window: _Window) -> list[int]:
        if self._fim is None:
            raise invalid(
                "this model cannot fill in the middle: `suffix` is not supported",
                param="suffix",
                code="unsupported_parameter",
            )
        before, between, after, suffix_first = self._fim
        suffix_ids = self._encode(suffix, window, "suffix")
        if suffix_first:
            return [between, *suffix_ids, before, *ids]
        return [before, *ids, between, *suffix_ids, after]


def _bytes_said(turns: tuple[Turn, ...]) -> int:
    """Of all that a template writes; thoughts are not counted, which many leave out. At least: characters stand for
    bytes."""
    return sum(
        len(part.text) if isinstance(part, TextPart) else len(part.arguments)
        for turn in turns
        for whole in turn.parts
        for part in (whole.content if isinstance(whole, ToolResultPart) else (whole,))
        if isinstance(part, TextPart | ToolCallPart)
    )


def _find_fim(tokenizer: Tokenizer) -> tuple[int, int, int, bool] | None:
    """Ids of the model's (prefix, suffix, middle) markers, None unless it has a complete set."""
    for prefix, suffix, middle, suffix_first in _FIM_MARKERS:
        ids = [tokenizer.token_id(marker) for marker in (prefix, suffix, middle or prefix)]
        if ids[0] is not None and ids[1] is not None and ids[2] is not None:
            return ids[0], ids[1], ids[2], suffix_first
    return None


def _render_failed(reason: str) -> ApiError:
    return ApiError("invalid_request", reason, code="template_render_failed", param="messages")

"""OpenAI completions: `POST /v1/completions`. Raw prompts, no chat template, no roles."""

from __future__ import annotations

import math
from typing import Any

from cortex_core.conversation import Limits, RawPrompt, Request
from cortex_core.dialects import limits, openai_fields
from cortex_core.dialects.json_body import Fields, decode_object, missing, unsupported, wrong_type
from cortex_core.dialects.openai_answer import (
    FINISH_REASONS,
    PING,
    ChunkFrame,
    StreamEnd,
    encode_json,
    finite_logprob,
    new_id,
    usage_object,
)
from cortex_core.errors import ApiError, invalid
from cortex_core.events import (
    Event,
    Failure,
    Finish,
    FinishReason,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
    Usage,
)

MAPPED = (
    "cache_salt",
    "echo",
    "frequency_penalty",
    "ignore_eos",
    "logit_bias",
    "logprobs",
    "max_tokens",
    "min_p",
    "model",
    "n",
    "presence_penalty",
    "prompt",
    "repetition_penalty",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "suffix",
    "temperature",
    "top_k",
    "top_p",
)
REFUSED = ("best_of",)
"""Refused where it asks for more candidates than are returned."""
IGNORED = ("user",)

DEFAULT_MAX_TOKENS = 16


def new_response_id() -> str:
    return new_id("cmpl-")


def parse(body: bytes) -> Request:
    """Raises `ApiError`, and nothing else, whatever the bytes."""
    fields = decode_object(body)
    num_choices = openai_fields.num_choices(fields)
    if (fields.integer("best_of", 1) or 1) > num_choices:
        raise unsupported("best_of", "only as many candidates are generated as are returned (n)")
    logprobs = fields.integer("logprobs", 0, limits.MAX_LOGPROBS)
    prompts = _prompts(fields, fields.string("suffix") or None)
    all_choices = len(prompts) * num_choices
    if all_choices > limits.MAX_CHOICES:
        raise invalid(f"n: at most {limits.MAX_CHOICES} choices over all prompts, got {all_choices}", param="n")
    echo = fields.boolean("echo")
    # Nothing to generate is a sensible wish where the prompt comes back as text; scoring it takes a step.
    max_tokens = openai_fields.max_tokens(fields, "max_tokens", minimum=0 if echo and logprobs is None else 1)
    return Request(
        model=fields.model_name(),
        prompts=prompts,
        sampling=openai_fields.sampling(fields),
        limits=Limits(
            max_tokens=DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens,
            stop=openai_fields.stop(fields),
            ignore_eos=fields.boolean("ignore_eos"),
        ),
        num_choices=num_choices,
        logprobs=logprobs,
        echo=echo,
        stream=fields.boolean("stream"),
        include_usage=openai_fields.include_usage(fields),
        cache_salt=openai_fields.cache_salt(fields),
    )


def _prompts(fields: Fields, suffix: str | None) -> tuple[RawPrompt, ...]:
    """A string, token ids, or an array of either."""
    value = fields.get("prompt")
    if value is None:
        raise missing("prompt")
    if type(value) is str:
        return (RawPrompt(text=value, suffix=suffix),)
    if type(value) is not list:
        raise wrong_type("prompt", "a string, an array of strings, or token ids", value)
    if not value:
        raise invalid("prompt: must not be empty", param="prompt")
    if _is_integer(value[0]):
        return (RawPrompt(token_ids=_token_ids(value, "prompt"), suffix=suffix),)
    if len(value) > limits.MAX_PROMPTS:
        raise invalid(f"prompt: at most {limits.MAX_PROMPTS} prompts, got {len(value)}", param="prompt")
    return tuple(_prompt(item, f"prompt[{index}]", suffix) for index, item in enumerate(value))


def _prompt(item: Any, path: str, suffix: str | None) -> RawPrompt:
    if type(item) is str:
        return RawPrompt(text=item, suffix=suffix)
    if type(item) is list:
        return RawPrompt(token_ids=_token_ids(item, path), suffix=suffix)
    raise wrong_type(path, "a string or an array of token ids", item)


def _token_ids(items: list[Any], path: str) -> tuple[int, ...]:
    if not items:
        raise invalid(f"{path}: must not be empty", param=path)
    for index, item in enumerate(items):
        if not _is_integer(item):
            raise wrong_type(f"{path}[{index}]", "a token id", item)
        if not 0 <= item <= limits.MAX_TOKEN_ID:
            raise invalid(f"{path}[{index}]: not a token id", param=f"{path}[{index}]")
    return tuple(map(int, items))


def _is_integer(item: Any) -> bool:
    """`3.0` is one, too."""
    return type(item) is int or (type(item) is float and item.is_integer())


def _count_choices(request: Request) -> int:
    return len(request.prompts) * request.num_choices


def _finish_reason(reason: FinishReason) -> str:
    mapped = FINISH_REASONS[reason]
    return "stop" if mapped == "tool_calls" else mapped


def _logprob(logprob: float) -> float | None:
    """The first token of an echoed prompt has none: it comes as NaN and goes as null."""
    return None if math.isnan(logprob) else finite_logprob(logprob)


class _LegacyLogprobs:
    """The column-wise format, with each token's character offset into the choice's text."""

    def __init__(self, top: int) -> None:
        self._top = top
        self._offset = 0

    def columns(self, event: TextDelta | ReasoningDelta) -> dict[str, Any]:
        """Columns of one delta. Tokens that complete no character share the offset of the next that does."""
        logprobs = event.logprobs if isinstance(event, TextDelta) else ()
        offsets: list[int] = []
        offset = self._offset
        self._offset += len(event.text)
        for entry in logprobs:
            offsets.append(offset)
            offset = min(offset + len(entry.token), self._offset)
        return {
            "tokens": [entry.token for entry in logprobs],
            "token_logprobs": [_logprob(entry.logprob) for entry in logprobs],
            "top_logprobs": [_candidates(entry) for entry in logprobs] if self._top else None,
            "text_offset": offsets,
        }


def _candidates(entry: TokenLogprob) -> dict[str, float] | None:
    """The most likely tokens and, as the official API has it, the sampled one wherever it stands."""
    sampled = _logprob(entry.logprob)
    if sampled is None:
        return None
    return {top.token: finite_logprob(top.logprob) for top in entry.top} | {entry.token: sampled}


class Projector:
    """See `interface.Projector`. An echoed prompt is the first text of its choice, put there by the renderer."""

    def __init__(self, request: Request, *, response_id: str, created: int, model: str) -> None:
        frame = ChunkFrame(request, kind="text_completion", response_id=response_id, created=created, model=model)
        self._frame = frame
        self._heads = [frame.prefix + b'[{"index":%d,"text":' % i for i in range(_count_choices(request))]
        self._text_end = b',"logprobs":null,"finish_reason":null}]' + frame.suffix
        self._logprobs: list[_LegacyLogprobs] = []
        if request.logprobs is not None:
            self._logprobs = [_LegacyLogprobs(request.logprobs) for _ in self._heads]
        self._stream = StreamEnd()

    def begin(self, prompt_tokens: int) -> bytes:
        """Nothing: a completion has no role to announce."""
        return b""

    def feed(self, event: Event) -> bytes:
        if self._stream.is_closed:
            return b""
        if isinstance(event, (TextDelta, ReasoningDelta)):
            if not event.text and not (isinstance(event, TextDelta) and event.logprobs):
                return b""
            if self._logprobs:
                return self._text_with_logprobs(event)
            return self._heads[event.choice] + encode_json(event.text) + self._text_end
        if isinstance(event, Finish):
            reason = _finish_reason(event.reason).encode()
            ending = b'"","logprobs":null,"finish_reason":"' + reason + b'"}]'
            return self._heads[event.choice] + ending + self._frame.suffix
        if isinstance(event, Usage):
            self._stream.has_usage = True
            return self._frame.usage_chunk(event)
        if isinstance(event, Failure):
            return self.fail(event.error)
        return b""  # tool calls are a matter of chat

    def _text_with_logprobs(self, event: TextDelta | ReasoningDelta) -> bytes:
        return (
            self._heads[event.choice]
            + encode_json(event.text)
            + b',"logprobs":'
            + encode_json(self._logprobs[event.choice].columns(event))
            + b',"finish_reason":null}]'
            + self._frame.suffix
        )

    def end(self) -> bytes:
        return self._stream.done()

    def fail(self, error: ApiError) -> bytes:
        return self._stream.fail(error)

    def ping(self) -> bytes:
        return b"" if self._stream.is_closed else PING


class _Completion:
    """One choice as it grows."""

    def __init__(self, top_logprobs: int | None) -> None:
        self.text: list[str] = []
        self.finish: Finish | None = None
        self.columns: dict[str, Any] | None = None
        self._legacy: _LegacyLogprobs | None = None
        if top_logprobs is not None:
            self._legacy = _LegacyLogprobs(top_logprobs)
            self.columns = {
                "tokens": [],
                "token_logprobs": [],
                "top_logprobs": [] if top_logprobs else None,
                "text_offset": [],
            }

    def add(self, event: TextDelta | ReasoningDelta) -> None:
        self.text.append(event.text)
        if self._legacy is None or self.columns is None:
            return
        for name, column in self._legacy.columns(event).items():
            if column is not None:
                self.columns[name] += column


class Collector:
    """See `interface.Collector`."""

    def __init__(self, request: Request, *, response_id: str, created: int, model: str) -> None:
        self._head = {"id": response_id, "object": "text_completion", "created": created, "model": model}
        self._completions = [_Completion(request.logprobs) for _ in range(_count_choices(request))]
        self._usage: Usage | None = None

    def feed(self, event: Event) -> None:
        if isinstance(event, Failure):
            raise event.error
        if isinstance(event, Usage):
            self._usage = event
        elif isinstance(event, (TextDelta, ReasoningDelta)):
            self._completions[event.choice].add(event)
        elif isinstance(event, Finish):
            self._completions[event.choice].finish = event

    def body(self) -> bytes:
        if self._usage is None:
            raise RuntimeError("the answer is not complete: no usage yet")
        choices = [self._choice(index, completion) for index, completion in enumerate(self._completions)]
        return encode_json({**self._head, "choices": choices, "usage": usage_object(self._usage)})

    def _choice(self, index: int, completion: _Completion) -> dict[str, Any]:
        if completion.finish is None:
            raise RuntimeError(f"the answer is not complete: choice {index} has not finished")
        return {
            "index": index,
            "text": "".join(completion.text),
            "logprobs": completion.columns,
            "finish_reason": _finish_reason(completion.finish.reason),
        }

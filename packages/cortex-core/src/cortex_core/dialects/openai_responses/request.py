"""Parse a responses request: everything but the items and the tools, which have modules of their own.

Each field of the official request type stands in exactly one of `MAPPED`, `REFUSED`, `ECHOED` and `IGNORED`. Fields
in none of them are unknown and ignored.
"""

from __future__ import annotations

from typing import Any

from cortex_core.conversation import Limits, Reasoning, Request, ResponseFormat, TextPart, Turn
from cortex_core.dialects import limits, openai_fields
from cortex_core.dialects.json_body import Fields, decode_object, missing, one_of, unsupported
from cortex_core.dialects.openai_responses.items import read_input
from cortex_core.dialects.openai_responses.tools import Tools, read_tool_choice, read_tools
from cortex_core.errors import ApiError

MAPPED = (
    "cache_salt",
    "chat_template_kwargs",
    "enable_thinking",
    "frequency_penalty",
    "ignore_eos",
    "include",
    "input",
    "instructions",
    "logit_bias",
    "max_output_tokens",
    "min_p",
    "model",
    "parallel_tool_calls",
    "presence_penalty",
    "reasoning",
    "repetition_penalty",
    "seed",
    "stop",
    "stream",
    "temperature",
    "text",
    "thinking",
    "tool_choice",
    "tools",
    "top_k",
    "top_logprobs",
    "top_p",
)
"""Official fields, and the extensions that are common among local servers."""

REFUSED = ("background", "conversation", "previous_response_id", "prompt")
"""They need something stored on the server, and nothing is: refused by name where they ask for something."""

ECHOED = ("max_tool_calls", "metadata", "prompt_cache_key", "safety_identifier", "user")
"""They come back in the response object and mean nothing else here."""

IGNORED = (
    "access_programs",
    "client_metadata",
    "context_management",
    "image",
    "moderation",
    "personality",
    "prompt_cache_options",
    "prompt_cache_retention",
    "service_tier",
    "store",
    "stream_options",
    "truncation",
)
"""Hints, caching and billing. `store`: nothing is ever stored. `truncation`: `auto` drops nothing either, a prompt that
is too long is an error."""

LOGPROBS = "message.output_text.logprobs"
ENCRYPTED_REASONING = "reasoning.encrypted_content"


def parse(body: bytes) -> Request:
    """Raises `ApiError`, and nothing else, whatever the bytes."""
    fields = decode_object(body)
    return _request(fields, fields.model_name())


def parse_input_tokens(body: bytes) -> Request:
    """The same body for counting. Renders to the same prompt, hence the same count."""
    return parse(body)


def _request(fields: Fields, model: str) -> Request:
    _refuse(fields)
    given = read_input(fields)
    tools = read_tools((*fields.objects("tools", limits.MAX_TOOLS), *given.added_tools))
    fields = Fields(dict(fields.values))
    for update in given.updates:  # an item in the input may change settings; the last word counts
        _reasoning(fields, None)  # what is overruled must be sound all the same
        _response_format(fields)
        fields.values.update({name: update.get(name) for name in ("reasoning", "text") if update.has(name)})
    template_kwargs = openai_fields.template_kwargs(fields)
    include = _include(fields)
    instructions = fields.string("instructions")
    max_tokens = openai_fields.max_tokens(fields, "max_output_tokens")
    return Request(
        model=model,
        turns=(*((Turn("system", (TextPart(instructions),)),) if instructions else ()), *given.turns),
        tools=tools.definitions,
        tool_choice=read_tool_choice(fields, tools.definitions),
        parallel_tool_calls=fields.boolean("parallel_tool_calls", True),
        response_format=_response_format(fields),
        sampling=openai_fields.sampling(fields),
        limits=Limits(max_tokens=max_tokens, stop=openai_fields.stop(fields), ignore_eos=fields.boolean("ignore_eos")),
        reasoning=_reasoning(fields, template_kwargs),
        logprobs=_logprobs(fields, include),
        stream=fields.boolean("stream"),
        template_kwargs={} if template_kwargs is None else template_kwargs.values,
        cache_salt=openai_fields.cache_salt(fields),
        param_names=_param_names(tools),
        echo_fields={"object": echoed(fields), "carries_thoughts": ENCRYPTED_REASONING in include},
    )


def _refuse(fields: Fields) -> None:
    if fields.get("previous_response_id"):
        error = unsupported(
            "previous_response_id", "responses are not stored here; send the whole conversation as input"
        )
        raise ApiError(error.kind, error.message, code="previous_response_not_found", param=error.param)
    openai_fields.refuse_unsupported(fields, ("background", "conversation", "prompt"), "nothing is stored here")


def _param_names(tools: Tools) -> dict[str, str]:
    return {
        "messages": "input",
        "response_format": "text.format",
        "response_format.json_schema.schema": "text.format.schema",
        **tools.param_names,
    }


def _include(fields: Fields) -> frozenset[str]:
    """What else the answer is to hold; values that name hosted tools have nothing to include."""
    return frozenset(value for value in fields.array("include") or () if type(value) is str)


def _logprobs(fields: Fields, include: frozenset[str]) -> int | None:
    top = fields.integer("top_logprobs", 0, limits.MAX_TOP_LOGPROBS)
    return (top or 0) if top or LOGPROBS in include else None


def _reasoning(fields: Fields, template_kwargs: Fields | None) -> Reasoning:
    given = fields.object("reasoning")
    effort = None if given is None else given.choice("effort", openai_fields.REASONING_EFFORTS)
    return openai_fields.reasoning(effort, fields, template_kwargs)


def _response_format(fields: Fields) -> ResponseFormat | None:
    text = fields.object("text")
    given = None if text is None else text.object("format")
    if given is None:
        return None
    kind = given.required_string("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return ResponseFormat("json_object")
    if kind != "json_schema":
        raise one_of(given.at("type"), kind, ("text", "json_object", "json_schema"))
    schema: Any = given.get("schema")
    if schema is None:
        raise missing(given.at("schema"))
    return ResponseFormat(
        "json_schema",
        openai_fields.json_schema(schema, given.at("schema")),
        given.string("name"),
        given.optional_boolean("strict"),
    )


# What comes back in the response object


def echoed(fields: Fields) -> dict[str, Any]:
    """The response object's part that repeats the request, complete: strict clients validate every key of it.

    What was not given stands there with the official default.
    """
    values = fields.values
    given_reasoning = values.get("reasoning") or {}
    text = values.get("text") or {}
    return {
        "background": False,
        "instructions": values.get("instructions"),
        "max_output_tokens": values.get("max_output_tokens"),
        "max_tool_calls": _typed(values.get("max_tool_calls"), int),
        "metadata": _typed(values.get("metadata"), dict) or {},
        "parallel_tool_calls": fields.boolean("parallel_tool_calls", True),
        "previous_response_id": None,
        "prompt_cache_key": _typed(values.get("prompt_cache_key"), str),
        "reasoning": {
            "effort": given_reasoning.get("effort"),
            "summary": given_reasoning.get("summary") or given_reasoning.get("generate_summary"),
        },
        "safety_identifier": _typed(values.get("safety_identifier"), str),
        "service_tier": "default",
        "store": False,
        "temperature": _or(values.get("temperature"), 1.0),
        "text": {"format": text.get("format") or {"type": "text"}, "verbosity": text.get("verbosity") or "medium"},
        "tool_choice": values.get("tool_choice") or "auto",
        "tools": [_echoed_tool(tool) for tool in values.get("tools") or ()],
        "top_logprobs": _or(values.get("top_logprobs"), 0),
        "top_p": _or(values.get("top_p"), 1.0),
        "presence_penalty": _or(values.get("presence_penalty"), 0.0),
        "frequency_penalty": _or(values.get("frequency_penalty"), 0.0),
        "truncation": "disabled",
        "user": _typed(values.get("user"), str),
    }


def _or(value: Any, default: float) -> Any:
    return default if value is None else value


def _typed(value: Any, kind: type) -> Any:
    """An ignored field is not looked at, so it may be anything; what comes back is of the right type or nothing."""
    return value if type(value) is kind else None


def _echoed_tool(tool: dict[str, Any]) -> dict[str, Any]:
    if tool.get("type") != "function":
        return tool
    function = tool if "name" in tool else {"type": "function", **(tool.get("function") or {})}
    return {"description": None, "parameters": None, "strict": False} | {
        name: value for name, value in function.items() if value is not None
    }

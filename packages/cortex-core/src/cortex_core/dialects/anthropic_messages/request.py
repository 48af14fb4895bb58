"""Parse a messages request: everything but the messages themselves, which `content` reads.

Each field of the official request type, beta included, stands in exactly one of `MAPPED` and `IGNORED`. Fields
in neither are unknown and ignored.
"""

from __future__ import annotations

from typing import Any

from cortex_core.conversation import (
    Limits,
    Reasoning,
    Request,
    ResponseFormat,
    Sampling,
    TextPart,
    ToolChoice,
    ToolDefinition,
    Turn,
)
from cortex_core.dialects import limits
from cortex_core.dialects.anthropic_messages.content import Messages, read_messages, text_blocks
from cortex_core.dialects.json_body import Fields, decode_object, missing, one_of, show, wrong_type
from cortex_core.dialects.stop_sequences import read_stop_sequences
from cortex_core.errors import invalid

MAPPED = (
    "max_tokens",
    "messages",
    "model",
    "output_config",
    "output_format",
    "stop_sequences",
    "stream",
    "system",
    "temperature",
    "thinking",
    "tool_choice",
    "tools",
    "top_k",
    "top_p",
)

IGNORED = (
    "betas",
    "billing_policy",
    "cache_control",
    "compaction",
    "container",
    "context_management",
    "diagnostics",
    "fallback_credit_token",
    "fallbacks",
    "inference_geo",
    "mcp_servers",
    "metadata",
    "safeguards",
    "service_tier",
    "speed",
    "thread",
    "user_profile_id",
    "workspace_id",
)
"""Hints, caching, billing, and features of the hosted service that a client survives without."""

EFFORTS = ("low", "medium", "high", "xhigh", "max")
THINKING_TYPES = ("enabled", "adaptive", "disabled", "between_tools")
THINKING_DISPLAYS = ("summarized", "omitted", "updates")
TOOL_CHOICES = ("auto", "any", "tool", "none")

MIN_THINKING_BUDGET = 1024

ATTRIBUTION_FILTER = "claude_code_attribution"
"""The name of the one filter, in configuration and logs."""

ATTRIBUTION_PREFIX = "x-anthropic-billing-header:"
DEFERRED_TOOL_PLACEHOLDER = "DeferredToolPlaceholder"


def parse(body: bytes, *, drops_attribution: bool = True) -> Request:
    """Raises `ApiError`, and nothing else, whatever the bytes.

    drops_attribution: apply `drop_attribution` to the system prompt.
    """
    fields = decode_object(body)
    max_tokens = fields.integer("max_tokens", 0)
    if max_tokens is None:
        raise missing("max_tokens")
    return _request(fields, max_tokens, drops_attribution)


def parse_count_tokens(body: bytes, *, drops_attribution: bool = True) -> Request:
    """The same body without `max_tokens`. Renders to the same prompt, hence the same count."""
    fields = decode_object(body)
    return _request(fields, fields.integer("max_tokens", 0), drops_attribution)


def _request(fields: Fields, max_tokens: int | None, drops_attribution: bool) -> Request:
    messages = read_messages(fields)
    declared = [
        (definition, tool.at("input_schema"))
        for tool in (*fields.objects("tools", limits.MAX_TOOLS), *messages.added_tools)
        if (definition := _tool(tool)) is not None
    ]
    if len(declared) > limits.MAX_TOOLS:
        path = declared[limits.MAX_TOOLS][1].removesuffix(".input_schema")
        raise invalid(f"{path}: at most {limits.MAX_TOOLS} tools, got {len(declared)}", param=path)
    tools = tuple(definition for definition, _ in declared)
    tool_choice, parallel_tool_calls = _tool_choice(fields, tools)
    system, dropped = _system(fields, drops_attribution)
    return Request(
        model=fields.model_name(),
        turns=(*system, *messages.turns),
        tools=tools,
        tool_choice=tool_choice,
        parallel_tool_calls=parallel_tool_calls,
        response_format=_response_format(fields),
        sampling=_sampling(fields),
        limits=Limits(max_tokens=_clamped(max_tokens), stop=_stop_sequences(fields)),
        reasoning=_reasoning(fields, max_tokens),
        stream=fields.boolean("stream"),
        continue_final_turn=_is_prefilled(messages),
        param_names={
            **_format_names(fields),
            **{f"tools[{index}].function.parameters": path for index, (_, path) in enumerate(declared)},
        },
        dropped=dropped,
    )


def _format_names(fields: Fields) -> dict[str, str]:
    output_config = fields.object("output_config")
    if output_config is not None and output_config.has("format"):
        name = "output_config.format"
    elif fields.has("output_format"):
        name = "output_format"
    else:
        return {}
    return {"response_format": name, "response_format.json_schema.schema": f"{name}.schema"}


def _clamped(max_tokens: int | None) -> int | None:
    """0 warms a cache: the prompt is processed and one token generated, the least an engine can do."""
    return None if max_tokens is None else min(max(max_tokens, 1), limits.MAX_TOKENS_CEILING)


def _is_prefilled(messages: Messages) -> bool:
    """An answer begun by the client. A turn that ends with a tool call is complete and cannot be continued."""
    last = messages.turns[-1]
    return last.role == "assistant" and (not last.parts or isinstance(last.parts[-1], TextPart))


# System prompt


def _system(fields: Fields, drops_attribution: bool) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
    """One turn, its blocks joined by line feeds, or none where nothing is said; and the filters that took effect."""
    given = text_blocks(fields, "system")
    texts = drop_attribution(given) if drops_attribution else given
    text = "\n".join(texts)
    turns = (Turn("system", (TextPart(text),)),) if text else ()
    return turns, (ATTRIBUTION_FILTER,) if texts is not given else ()


def drop_attribution(texts: list[str]) -> list[str]:
    """Remove the attribution line that Claude Code puts before its system prompt.

    Its value changes from version to version, in some versions with each request, and so would bust every KV
    prefix. Only the first block is looked at, and only its first line is removed: a proxy may have joined blocks.
    """
    if not texts or not texts[0].startswith(ATTRIBUTION_PREFIX):
        return texts
    rest = texts[0].partition("\n")[2]
    return [rest, *texts[1:]] if rest else texts[1:]


# Tools


def _tool(tool: Fields) -> ToolDefinition | None:
    """None for tools that run on Anthropic's servers or whose schema only its models know, and for the placeholder
    by which Claude Code says that more tools could be searched for: deferred tools are all offered at once."""
    kind = tool.string("type", "custom")
    if kind != "custom":
        return None
    name = tool.required_name("name")
    description, strict, is_deferred = tool.string("description"), tool.boolean("strict"), tool.boolean("defer_loading")
    if name == DEFERRED_TOOL_PLACEHOLDER and is_deferred:
        return None
    parameters = tool.required_object("input_schema").values
    return ToolDefinition(name=name, description=description, parameters=parameters, strict=strict)


def _tool_choice(fields: Fields, tools: tuple[ToolDefinition, ...]) -> tuple[ToolChoice, bool]:
    """The choice, and whether calls may be parallel."""
    choice = fields.object("tool_choice")
    if choice is None:
        return ToolChoice(), True
    kind = choice.required_string("type")
    is_parallel = not choice.boolean("disable_parallel_tool_use")
    if kind == "auto":
        return ToolChoice("auto"), is_parallel
    if kind == "none":
        return ToolChoice("none"), is_parallel
    if kind not in TOOL_CHOICES:
        raise one_of("tool_choice.type", kind, TOOL_CHOICES)
    if not tools:
        raise invalid("tool_choice: a tool must be declared in 'tools' to be chosen", param="tool_choice")
    if kind == "any":
        return ToolChoice("required"), is_parallel
    name = choice.required_name("name")
    if all(tool.name != name for tool in tools):
        raise invalid(f"tool_choice.name: no tool named {show(name)} is declared in 'tools'", param="tool_choice.name")
    return ToolChoice("named", name), is_parallel


# Constraints


def _response_format(fields: Fields) -> ResponseFormat | None:
    """`output_config.format`, formerly `output_format`."""
    output_config = fields.object("output_config")
    current = None if output_config is None else output_config.object("format")
    former = fields.object("output_format")
    chosen, other = (former, None) if current is None else (current, former)
    if other is not None:
        _constraint(other)  # what is overruled must be sound all the same
    return None if chosen is None else _constraint(chosen)


def _constraint(output_format: Fields) -> ResponseFormat | None:
    kind = output_format.required_string("type")
    if kind == "text":
        return None
    if kind != "json_schema":
        raise one_of(output_format.at("type"), kind, ("json_schema",))
    schema: Any = output_format.get("schema")
    if schema is None:
        raise missing(output_format.at("schema"))
    if type(schema) is not dict and type(schema) is not bool:
        raise wrong_type(output_format.at("schema"), "a JSON Schema object", schema)
    return ResponseFormat("json_schema", schema, strict=True)


def _sampling(fields: Fields) -> Sampling:
    """Gone from the newest official types, still sent by many clients, and honoured."""
    top_k = fields.integer("top_k", -1)
    return Sampling(
        temperature=fields.number("temperature", 0, 1),
        top_p=fields.number("top_p", 0, 1),
        top_k=None if top_k is None else min(max(top_k, 0), limits.MAX_TOKEN_ID),
    )


def _stop_sequences(fields: Fields) -> tuple[str, ...]:
    return read_stop_sequences(fields.array("stop_sequences") or [], "stop_sequences")


def _reasoning(fields: Fields, max_tokens: int | None) -> Reasoning:
    """Absent means off, and then no thinking block is shown whatever the model does.

    `adaptive` leaves the amount to the model; `between_tools` is thinking turned off with progress notes between
    tool calls, which local models do not write.
    """
    output_config = fields.object("output_config")
    effort = None if output_config is None else output_config.choice("effort", EFFORTS)
    thinking = fields.object("thinking")
    if thinking is None:
        return Reasoning(mode="off", effort=effort, visible=False)
    kind = thinking.required_string("type")
    if kind not in THINKING_TYPES:
        raise one_of("thinking.type", kind, THINKING_TYPES)
    display = thinking.choice("display", THINKING_DISPLAYS)
    if kind == "disabled" or kind == "between_tools":
        return Reasoning(mode="off", effort=effort, visible=False)
    return Reasoning(
        mode="on",
        effort=effort,
        budget_tokens=_thinking_budget(thinking, max_tokens) if kind == "enabled" else None,
        omit_text=display == "omitted",
    )


def _thinking_budget(thinking: Fields, max_tokens: int | None) -> int:
    budget = thinking.integer("budget_tokens", MIN_THINKING_BUDGET)
    if budget is None:
        raise missing("thinking.budget_tokens")
    if max_tokens and budget >= max_tokens:
        raise invalid(
            f"max_tokens: must be greater than thinking.budget_tokens ({budget}), got {max_tokens}",
            param="max_tokens",
        )
    return min(budget, limits.MAX_TOKENS_CEILING)

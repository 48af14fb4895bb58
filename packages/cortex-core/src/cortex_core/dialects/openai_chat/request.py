"""Parse a chat completion request.

Each field of the official request type stands in exactly one of `MAPPED`, `REFUSED` and `IGNORED`. Fields in
none of them are unknown and ignored; unknown roles and content part types are refused.
"""

from __future__ import annotations

from typing import Any

from cortex_core.conversation import (
    ImagePart,
    Limits,
    Part,
    Request,
    ResponseFormat,
    TextPart,
    ThinkingPart,
    ToolCallPart,
    ToolChoice,
    ToolDefinition,
    ToolResultPart,
    Turn,
)
from cortex_core.dialects import limits, openai_fields
from cortex_core.dialects.json_body import (
    Fields,
    decode_object,
    encode_compact,
    missing,
    one_of,
    show,
    unsupported,
    wrong_type,
)
from cortex_core.dialects.openai_custom_tools import freeform_arguments, freeform_tool
from cortex_core.dialects.openai_images import image_part
from cortex_core.errors import ApiError, invalid

MAPPED = (
    "cache_salt",
    "chat_template_kwargs",
    "continue_final_message",
    "enable_thinking",
    "frequency_penalty",
    "guided_json",
    "ignore_eos",
    "logit_bias",
    "logprobs",
    "max_completion_tokens",
    "max_tokens",
    "messages",
    "min_p",
    "model",
    "n",
    "parallel_tool_calls",
    "presence_penalty",
    "reasoning_effort",
    "repetition_penalty",
    "response_format",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "temperature",
    "thinking",
    "tool_choice",
    "tools",
    "top_k",
    "top_logprobs",
    "top_p",
)
"""Official fields, and the extensions that are common among local servers."""

REFUSED = ("guided_choice", "guided_grammar", "guided_regex", "modalities")
"""Refused by name where they ask for something: `modalities` when it holds more than `text`."""

IGNORED = (
    "audio",
    "function_call",
    "functions",
    "metadata",
    "moderation",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
    "verbosity",
    "web_search_options",
)
"""Hints, caching and billing; and the `functions` pair, superseded by `tools` in 2023."""

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
TOOL_TYPES = ("function", "custom")
TOOL_MODES = ("none", "auto", "required")


def parse(body: bytes) -> Request:
    """Raises `ApiError`, and nothing else, whatever the bytes."""
    fields = decode_object(body)
    _refuse(fields)
    tools = tuple(_tool(tool) for tool in fields.objects("tools", limits.MAX_TOOLS))
    template_kwargs = openai_fields.template_kwargs(fields)
    turns = _turns(fields)
    max_completion_tokens = openai_fields.max_tokens(fields, "max_completion_tokens")
    max_tokens = openai_fields.max_tokens(fields, "max_tokens")
    return Request(
        model=fields.model_name(),
        turns=turns,
        tools=tools,
        tool_choice=_tool_choice(fields, tools),
        parallel_tool_calls=fields.boolean("parallel_tool_calls", True),
        response_format=_response_format(fields),
        sampling=openai_fields.sampling(fields),
        limits=Limits(
            max_tokens=max_tokens if max_completion_tokens is None else max_completion_tokens,
            stop=openai_fields.stop(fields),
            ignore_eos=fields.boolean("ignore_eos"),
        ),
        reasoning=openai_fields.reasoning(
            fields.choice("reasoning_effort", openai_fields.REASONING_EFFORTS), fields, template_kwargs
        ),
        num_choices=openai_fields.num_choices(fields),
        logprobs=_logprobs(fields),
        stream=fields.boolean("stream"),
        include_usage=openai_fields.include_usage(fields),
        continue_final_turn=_continues(fields, turns),
        template_kwargs={} if template_kwargs is None else template_kwargs.values,
        cache_salt=openai_fields.cache_salt(fields),
        param_names={
            f"tools[{index}].function.parameters": f"tools[{index}].custom.format"
            for index, tool in enumerate(tools)
            if tool.is_freeform
        },
    )


def _refuse(fields: Fields) -> None:
    openai_fields.refuse_unsupported(
        fields, ("guided_choice", "guided_grammar", "guided_regex"), "not supported; use response_format"
    )
    for index, modality in enumerate(fields.array("modalities") or ()):
        if modality != "text":
            raise unsupported(f"modalities[{index}]", "only 'text' can be generated")


# Messages


def _turns(fields: Fields) -> tuple[Turn, ...]:
    if fields.array("messages", limits.MAX_MESSAGES) is None:
        raise missing("messages")
    fields.check_parts("messages", "content", "tool_calls")
    turns: list[Turn] = []
    call_names: dict[str, str] = {}
    for message in fields.objects("messages"):
        turn = _turn(message, call_names)
        turns.append(turn)
        call_names.update((part.id, part.name) for part in turn.parts if isinstance(part, ToolCallPart))
    if not turns:
        raise invalid("messages: at least one message is required", param="messages")
    return tuple(turns)


def _turn(message: Fields, call_names: dict[str, str]) -> Turn:
    role = message.required_string("role")
    if role == "user":
        return Turn("user", _parts(message, images=True))
    if role == "assistant":
        return Turn("assistant", _assistant_parts(message))
    if role == "system" or role == "developer":
        return Turn("system", _parts(message, images=False))
    if role == "tool":
        call_id = message.required_string("tool_call_id", may_be_empty=True)
        name = message.name("name") or call_names.get(call_id)
        return Turn("tool", (ToolResultPart(call_id, _parts(message, images=True), name=name),))
    if role == "function":
        # The predecessor of tool calls had no ids: the name links call and result.
        name = message.required_name("name")
        return Turn("tool", (ToolResultPart(name, _parts(message, images=False), name=name),))
    raise one_of(message.at("role"), role, ROLES)


def _parts(message: Fields, *, images: bool) -> tuple[TextPart | ImagePart, ...]:
    """Content as a string, null or parts. Empty text is no part, so that all ways to say nothing are equal."""
    content = message.get("content")
    if content is None:
        return ()
    if type(content) is str:
        return (TextPart(content),) if content else ()
    path = message.at("content")
    if type(content) is not list:
        raise wrong_type(path, "a string or an array of parts", content)
    parts: list[TextPart | ImagePart] = []
    for part in message.objects("content"):
        kind = part.required_string("type")
        if kind == "text" or kind == "refusal":
            text = part.required_string(kind, may_be_empty=True)
            if text:
                parts.append(TextPart(text))
        elif kind == "image_url" and images:
            parts.append(image_part(part))
        elif kind in ("image_url", "input_audio", "file"):
            raise unsupported(part.at("type"), f"content of type '{kind}' is not supported here")
        else:
            raise one_of(part.at("type"), kind, ("text", "image_url"))
    return tuple(parts)


def _assistant_parts(message: Fields) -> tuple[Part, ...]:
    parts: list[Part] = []
    reasoning = message.string("reasoning_content")
    if reasoning is None and type(message.get("reasoning")) is str:
        reasoning = message.get("reasoning")
    if reasoning:
        parts.append(ThinkingPart(reasoning))
    text = _parts(message, images=False)
    refusal = message.string("refusal")
    parts.extend(text)
    if refusal and not text:
        parts.append(TextPart(refusal))
    parts.extend(_tool_call(call) for call in message.objects("tool_calls"))
    legacy_call = message.object("function_call")
    if legacy_call is not None:
        name = legacy_call.required_name("name")
        parts.append(ToolCallPart(name, name, _arguments(legacy_call)))
    return tuple(parts)


def _tool_call(call: Fields) -> ToolCallPart:
    kind = call.string("type", "function")
    call_id = call.required_string("id", may_be_empty=True)
    if kind == "function":
        function = call.required_object("function")
        return ToolCallPart(call_id, function.required_name("name"), _arguments(function))
    if kind == "custom":
        custom = call.required_object("custom")
        text = custom.required_string("input", may_be_empty=True)
        return ToolCallPart(call_id, custom.required_name("name"), freeform_arguments(text))
    raise one_of(call.at("type"), kind, TOOL_TYPES)


def _arguments(function: Fields) -> str:
    """JSON text; an object is tolerated, as some servers answer so and their clients replay it."""
    arguments = function.get("arguments")
    if type(arguments) is dict:
        return encode_compact(arguments)
    return function.string("arguments") or "{}"


def _continues(fields: Fields, turns: tuple[Turn, ...]) -> bool:
    """An extension: the last assistant message is the beginning of the answer. Without it, it is history."""
    if not fields.boolean("continue_final_message"):
        return False
    if turns[-1].role != "assistant" or any(isinstance(part, ToolCallPart) for part in turns[-1].parts):
        raise invalid(
            "continue_final_message: the last message must be an assistant message without tool calls",
            param="continue_final_message",
        )
    return True


# Tools and constraints


def _tool(tool: Fields) -> ToolDefinition:
    kind = tool.required_string("type")
    if kind == "custom":
        custom = tool.required_object("custom")
        return freeform_tool(custom, custom.required_name("name"), wrapped_grammar=True)
    if kind != "function":
        raise one_of(tool.at("type"), kind, TOOL_TYPES)
    function = tool.required_object("function")
    parameters = function.object("parameters")
    return ToolDefinition(
        name=function.required_name("name"),
        description=function.string("description"),
        parameters=None if parameters is None else parameters.values,
        strict=function.boolean("strict"),
    )


def _tool_choice(fields: Fields, tools: tuple[ToolDefinition, ...]) -> ToolChoice:
    value = fields.get("tool_choice")
    if value is None:
        return ToolChoice()
    if type(value) is str:
        if value not in TOOL_MODES:
            raise one_of("tool_choice", value, TOOL_MODES)
        if value == "required":
            _demand_tools(tools)
            return ToolChoice("required")
        return ToolChoice("none" if value == "none" else "auto")
    choice = Fields.of(value, "tool_choice")
    kind = choice.required_string("type")
    names = {tool.name for tool in tools}
    if kind in TOOL_TYPES:
        _demand_tools(tools)
        return ToolChoice("named", _known_name(choice.required_object(kind), names))
    if kind == "allowed_tools":
        return _allowed_tools(choice.required_object("allowed_tools"), tools, names)
    raise one_of("tool_choice.type", kind, (*TOOL_TYPES, "allowed_tools"))


def _allowed_tools(allowed: Fields, tools: tuple[ToolDefinition, ...], names: set[str]) -> ToolChoice:
    _demand_tools(tools)
    mode = allowed.choice("mode", ("auto", "required"))
    if mode is None:
        raise missing(allowed.at("mode"))
    listed = tuple(_known_name(_named_object(tool), names) for tool in allowed.objects("tools", limits.MAX_TOOLS))
    if not listed:
        raise invalid(f"{allowed.at('tools')}: must not be empty", param=allowed.at("tools"))
    return ToolChoice("required" if mode == "required" else "auto", allowed=listed)


def _named_object(tool: Fields) -> Fields:
    """The object with the name in a reference to a tool; a reference without a type is one to a function."""
    return tool.required_object("custom" if tool.get("type") == "custom" else "function")


def _demand_tools(tools: tuple[ToolDefinition, ...]) -> None:
    if not tools:
        raise invalid("tool_choice: a tool must be declared in 'tools' to be chosen", param="tool_choice")


def _known_name(function: Fields, names: set[str]) -> str:
    name = function.required_string("name")
    if name not in names:
        raise unknown_tool(function.at("name"), name)
    return name


def unknown_tool(path: str, name: str) -> ApiError:
    return invalid(f"{path}: no tool named {show(name)} is declared in 'tools'", param=path)


def _response_format(fields: Fields) -> ResponseFormat | None:
    """`json_schema` without a schema asks for any object. `guided_json` is the older extension for the same."""
    response_format = fields.object("response_format")
    kind = "text" if response_format is None else response_format.required_string("type")
    guided = openai_fields.json_schema(fields.get("guided_json"), "guided_json") if fields.has("guided_json") else None
    if response_format is None or kind == "text":
        return None if guided is None else ResponseFormat("json_schema", guided)
    if kind == "json_object":
        return ResponseFormat("json_object")
    if kind != "json_schema":
        raise one_of("response_format.type", kind, ("text", "json_object", "json_schema"))
    wrapper = response_format.required_object("json_schema")
    name = wrapper.string("name")
    strict = wrapper.optional_boolean("strict")
    schema: Any = wrapper.get("schema")
    if schema is None:
        return ResponseFormat("json_object", name=name, strict=strict)
    return ResponseFormat("json_schema", openai_fields.json_schema(schema, wrapper.at("schema")), name, strict)


def _logprobs(fields: Fields) -> int | None:
    wanted = fields.boolean("logprobs")
    top = fields.integer("top_logprobs", 0, limits.MAX_TOP_LOGPROBS)
    if top and not wanted:
        raise invalid("top_logprobs: needs logprobs to be true", param="top_logprobs")
    return (top or 0) if wanted else None

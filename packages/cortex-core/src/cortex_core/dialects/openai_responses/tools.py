"""The tools of a request: functions, custom tools, and namespaces of both.

The model sees one flat list of functions. A member of a namespace gets both names in one; `ToolDefinition.member` and
`.namespace` let the answer speak of it as the client does.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import msgspec

from cortex_core.conversation import ToolChoice, ToolDefinition
from cortex_core.dialects import limits
from cortex_core.dialects.json_body import Fields, missing, one_of, show, unsupported
from cortex_core.dialects.openai_custom_tools import freeform_tool
from cortex_core.errors import invalid

HOSTED_TOOLS = (
    "apply_patch",
    "code_interpreter",
    "computer",
    "computer_use_preview",
    "file_search",
    "image_generation",
    "local_shell",
    "mcp",
    "programmatic_tool_calling",
    "shell",
    "tool_search",
    "web_search",
    "web_search_2025_08_26",
    "web_search_preview",
    "web_search_preview_2025_03_11",
)
"""Known types of tools that run elsewhere or that only the vendor's models know. They, and types yet unknown, are not
offered to the model; agents declare them to every server."""

CHOICE_MODES = ("none", "auto", "required")
CHOICE_TYPES = ("function", "custom", "allowed_tools")


class Tools(msgspec.Struct, frozen=True):
    """paths: where each definition stands in the body; param_names: `Request.param_names` of their schemas."""

    definitions: tuple[ToolDefinition, ...]
    paths: tuple[str, ...]

    @property
    def param_names(self) -> dict[str, str]:
        return {
            f"tools[{index}].function.parameters": f"{path}.{'format' if tool.is_freeform else 'parameters'}"
            for index, (tool, path) in enumerate(zip(self.definitions, self.paths, strict=True))
        }


def read_tools(declared: Iterable[Fields]) -> Tools:
    """All tools that a model can be offered. A name declared again (a tool search loads tools anew) replaces itself."""
    found: dict[str, tuple[ToolDefinition, str]] = {}
    num_repeated = 0
    for tool in declared:
        kind = tool.required_string("type")
        if kind == "namespace":
            namespace = tool.required_name("name")
            about = tool.string("description")
            num_repeated += len(about or "") * len(tool.array("tools", limits.MAX_TOOLS) or ())
            if num_repeated > limits.MAX_NAMESPACE_CHARACTERS:
                most = f"at most {limits.MAX_NAMESPACE_CHARACTERS} characters, counted for each tool of a namespace"
                raise invalid(f"{tool.at('description')}: {most}, got {num_repeated}", param=tool.at("description"))
            for member in tool.objects("tools"):
                definition = _tool(member, member.required_string("type"), namespace, about)
                if definition is not None:
                    found[definition.name] = definition, member.path
                    _check_number(found, member)
        else:
            definition = _tool(tool, kind, None, None)
            if definition is not None:
                found[definition.name] = definition, tool.path
                _check_number(found, tool)
    return Tools(tuple(tool for tool, _ in found.values()), tuple(path for _, path in found.values()))


def _check_number(found: dict[str, tuple[ToolDefinition, str]], last: Fields) -> None:
    if len(found) > limits.MAX_TOOLS:
        raise invalid(f"{last.path}: at most {limits.MAX_TOOLS} tools, got more", param=last.path)


def _tool(tool: Fields, kind: str, namespace: str | None, about: str | None) -> ToolDefinition | None:
    if kind == "function":
        # Clients of several servers declare functions in the nested form of chat here, too.
        function = tool if tool.has("name") else tool.object("function") or tool
        member = function.required_name("name")
        parameters = function.object("parameters")
        definition = ToolDefinition(
            name=flat_name(namespace, member),
            description=function.string("description"),
            parameters=None if parameters is None else parameters.values,
            strict=function.boolean("strict"),
            namespace=namespace,
            member=None if namespace is None else member,
        )
    elif kind == "custom":
        member = tool.required_name("name")
        definition = freeform_tool(
            tool, flat_name(namespace, member), namespace=namespace, member=None if namespace is None else member
        )
    else:
        return None
    if about:
        described = f"{about}\n\n{definition.description}" if definition.description else about
        definition = msgspec.structs.replace(definition, description=described)
    return definition


def flat_name(namespace: str | None, member: str) -> str:
    """`namespace__member`, the form in which agents name the tools of their servers elsewhere."""
    if not namespace:
        return member
    return f"{namespace}{'' if namespace.endswith('__') else '__'}{member}"


class ToolNames:
    """How the client calls the tools that the model calls by their flat names."""

    __slots__ = ("_by_member", "_by_name")

    def __init__(self, tools: tuple[ToolDefinition, ...]) -> None:
        self._by_name = {tool.name: tool for tool in tools}
        self._by_member: dict[str, ToolDefinition | None] = {}
        for tool in tools:
            if tool.member is not None:  # None where several namespaces have a member of that name
                self._by_member[tool.member] = None if tool.member in self._by_member else tool

    def find(self, name: str) -> ToolDefinition | None:
        """A model may leave the namespace away; that is understood where only one tool can be meant."""
        return self._by_name.get(name) or self._by_member.get(name)

    def flat(self, reference: Fields) -> str:
        """The flat name of a reference `{name, namespace?}`. Raises `ApiError` where no tool has it."""
        member = reference.required_name("name")
        found = self.find(flat_name(reference.name("namespace"), member))
        if found is None:
            raise invalid(
                f"{reference.at('name')}: no tool named {show(member)} is declared in 'tools'",
                param=reference.at("name"),
            )
        return found.name

    def in_namespaces(self, namespaces: Container[str]) -> list[str]:
        return [
            name for name, tool in self._by_name.items() if tool.namespace is not None and tool.namespace in namespaces
        ]


def read_tool_choice(fields: Fields, tools: tuple[ToolDefinition, ...]) -> ToolChoice:
    value: Any = fields.get("tool_choice")
    if value is None:
        return ToolChoice()
    if type(value) is str:
        if value not in CHOICE_MODES:
            raise one_of("tool_choice", value, CHOICE_MODES)
        if value == "required":
            _demand(tools)
            return ToolChoice("required")
        return ToolChoice("none" if value == "none" else "auto")
    choice = Fields.of(value, "tool_choice")
    kind = choice.required_string("type")
    if kind in ("function", "custom"):
        _demand(tools)
        named = choice if choice.has("name") else choice.object("function") or choice
        return ToolChoice("named", ToolNames(tools).flat(named))
    if kind == "allowed_tools":
        return _allowed(choice, tools)
    if kind in HOSTED_TOOLS:
        raise unsupported("tool_choice.type", f"tools of type '{kind}' cannot be called here")
    raise one_of("tool_choice.type", kind, CHOICE_TYPES)


def _allowed(choice: Fields, tools: tuple[ToolDefinition, ...]) -> ToolChoice:
    """Hosted tools in the list were never on offer; with nothing else in it, nothing is."""
    mode = choice.choice("mode", ("auto", "required"))
    if mode is None:
        raise missing(choice.at("mode"))
    names = ToolNames(tools)
    listed: list[str] = []
    namespaces: dict[str, None] = {}
    for reference in choice.objects("tools", limits.MAX_TOOLS):
        kind = reference.string("type", "function")
        if kind in ("function", "custom"):
            listed.append(names.flat(reference))
        elif kind == "namespace":
            namespaces[reference.required_name("name")] = None
    listed += names.in_namespaces(namespaces)
    if not listed:
        if mode == "auto":
            return ToolChoice("none")
        raise invalid(f"{choice.at('tools')}: lists no tool that can be called", param=choice.at("tools"))
    return ToolChoice("required" if mode == "required" else "auto", allowed=tuple(dict.fromkeys(listed)))


def _demand(tools: tuple[ToolDefinition, ...]) -> None:
    if not tools:
        raise invalid("tool_choice: a function or custom tool must be declared to be chosen", param="tool_choice")

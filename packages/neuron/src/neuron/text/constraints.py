"""Grammars for what a request demands of the output: `response_format` and forced tool calls.

A grammar is text in llguidance's Lark dialect, compiled here once with the compiler's limits on, so that a bad schema
is a 400 before any device work; the engine compiles the same text again next to its tokenizer. There is one backend
and it never fails open: a valid schema that the compiler cannot honour in full is loosened keyword by keyword down
to "any JSON of that kind", and an invalid one is refused. Under `tool_choice: auto` nothing is constrained, `strict`
tools included: the model may always answer in prose.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections import OrderedDict
from typing import Any

import llguidance
from cortex_core.conversation import Request, ToolDefinition
from cortex_core.errors import ApiError, invalid

from neuron.protocol import GrammarSpec
from neuron.text import json_schema
from neuron.text.markers import MarkerPair
from neuron.text.prompt import Prompt, offered_tools

logger = logging.getLogger(__name__)

# One space, or one line break with an indent: enough for every usual layout, and too little for a small model to
# lose itself in blanks. Matched at most once in each place.
_WHITESPACE = r"( |\n {0,24})"
_MAX_CALLS = 16
_CACHE_ENTRIES = 512
_FREE_TEXT = r"/(.|\n)*/"

# What llguidance cannot compile and lenient mode does not ignore, in the order in which it is given up.
_LOOSENING_STEPS: tuple[tuple[str, ...], ...] = (
    ("pattern", "patternProperties", "propertyNames", "format"),
    ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties", "multipleOf"),
    ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    ("not", "if", "then", "else", "dependentRequired", "dependentSchemas", "unevaluatedProperties", "$id", "$schema"),
    ("allOf", "oneOf", "unevaluatedItems", "$dynamicRef", "$anchor", "$dynamicAnchor"),
)


class GrammarBuilder:
    """Builds and checks the grammars of one model. Thread-safe.

    reasoning, tool_calls: the model's markers. A marker that is a vocabulary entry is demanded as that token.
    """

    def __init__(self, reasoning: MarkerPair | None, tool_calls: MarkerPair) -> None:
        self._reasoning = reasoning
        self._tool_calls = tool_calls
        self._limits = llguidance.LLParserLimits(verbose_errors=False)
        self._schemas: OrderedDict[bytes, str | ApiError] = OrderedDict()
        self._failures: OrderedDict[bytes, str | None] = OrderedDict()
        self._lock = threading.Lock()

    def build(self, request: Request, prompt: Prompt) -> GrammarSpec | None:
        """The grammar of one request, None where anything may be said.

        Raises `ApiError` with the field's path: an invalid schema, a tool that is not among the tools.
        """
        self._check_choice(request)
        rules: list[str] = []
        alternatives: list[str] = []
        if request.response_format is not None:
            schema: Any = {"type": "object"}
            if request.response_format.kind == "json_schema":
                schema = request.response_format.schema
                schema = True if schema is None else schema
            compiled = self._compiled(schema, "response_format.json_schema.schema")
            rules.append(f"document: %json {compiled}")
            alternatives.append("document")
        mode = request.tool_choice.mode
        tools = offered_tools(request)
        if (mode in ("required", "named") and tools) or (alternatives and mode == "auto" and tools):
            rules += self._call_rules(request, tools)
            if mode in ("required", "named"):
                alternatives = ["calls"]
            else:
                alternatives.append("calls")
        if not alternatives:
            return None
        body = " | ".join(alternatives)
        lines = ["%llguidance {}", *self._start_rules(prompt, body), *rules]
        grammar = "\n".join(lines) + "\n"
        failure = self._known_failure(grammar)
        if failure is not None:
            raise invalid(f"the requested output cannot be constrained: {failure}", param=_param_of(request))
        return GrammarSpec(grammar)

    # ------------------------------------------------------------ rules

    def _start_rules(self, prompt: Prompt, body: str) -> list[str]:
        """`start`, with the reasoning that may or must come first."""
        pair = self._reasoning
        if pair is None or prompt.reasoning == "none":
            return [f"start: {body}" if " | " not in body else f"start: ({body})"]
        if pair.in_vocabulary:
            rest = f"thought {_token(pair.close_id)} gap"
            rules = [f"thought: {_FREE_TEXT}"]
            opening = _token(pair.open_id)
        else:
            rest = "thought gap"
            close = json.dumps(pair.close)
            rules = [f"thought[suffix={close}]: {_FREE_TEXT}"]
            opening = json.dumps(pair.open)
        rules.append(r"gap: /[ \n]{0,4}/")
        if prompt.reasoning == "open":
            return [f"start: {rest} ({body})", *rules]
        return [f"start: ({opening} {rest})? ({body})", *rules]

    def _call_rules(self, request: Request, tools: tuple[ToolDefinition, ...]) -> list[str]:
        choice = request.tool_choice
        positions = {id(tool): index for index, tool in enumerate(request.tools)}
        if choice.mode == "named":
            tools = tuple(tool for tool in tools if tool.name == choice.name)[:1]
        pair = self._tool_calls
        opening = _token(pair.open_id) if pair.in_vocabulary else json.dumps(pair.open)
        closing = _token(pair.close_id) if pair.in_vocabulary else json.dumps(pair.close)
        single = choice.mode == "named" or not request.parallel_tool_calls
        rules = [
            "calls: call" if single else f'calls: call ("\\n" call){{0,{_MAX_CALLS - 1}}}',
            f'call: {opening} "\\n" ({" | ".join(f"call_{n}" for n in range(len(tools)))}) "\\n" {closing}',
        ]
        for number, tool in enumerate(tools):
            schema: Any = tool.parameters or {"type": "object", "properties": {}}
            param = f"tools[{positions[id(tool)]}].function.parameters"
            compiled = self._compiled(_as_object(schema), param)
            head = f'{{"name": {json.dumps(tool.name, ensure_ascii=False)}, "arguments": '
            rules.append(f"call_{number}: {json.dumps(head, ensure_ascii=False)} arguments_{number} " + r'"}"')
            rules.append(f"arguments_{number}: %json {compiled}")
        return rules

    def _check_choice(self, request: Request) -> None:
        choice = request.tool_choice
        names = {tool.name for tool in request.tools}
        if choice.mode == "named" and choice.name not in names:
            raise invalid(f"tool_choice names `{choice.name}`, which is not among the tools", param="tool_choice")
        unknown = next((name for name in choice.allowed or () if name not in names), None)
        if unknown is not None:
            raise invalid(f"tool_choice allows `{unknown}`, which is not among the tools", param="tool_choice")
        if choice.mode == "required" and not offered_tools(request):
            raise invalid("tool_choice requires a tool call, but there are no tools", param="tool_choice")

    # ------------------------------------------------------------ schemas

    def _compiled(self, schema: Any, param: str) -> str:
        """`schema` as JSON text that llguidance accepts; cached by content. Raises `ApiError`."""
        try:
            key = hashlib.sha256(json.dumps(schema).encode()).digest()
        except (TypeError, ValueError, RecursionError) as exc:
            raise invalid(f"Invalid schema: {exc}", param=param, code="invalid_value") from exc
        with self._lock:
            known = self._schemas.get(key)
            if known is not None:
                self._schemas.move_to_end(key)
        if known is None:
            try:
                known = self._compile(schema)
            except json_schema.SchemaError as exc:
                known = ApiError("invalid_request", f"Invalid schema: {exc}", code="invalid_value")
            with self._lock:
                self._schemas[key] = known
                if len(self._schemas) > _CACHE_ENTRIES:
                    self._schemas.popitem(last=False)
        if isinstance(known, ApiError):
            raise invalid(known.message, param=param)
        return known

    def _compile(self, schema: Any) -> str:
        """Raises `SchemaError` for a schema that is invalid or that nothing can satisfy."""
        json_schema.check(schema)
        strict = _close_objects(_without_remote_references(schema))
        for lenient in (False, True):
            text = _guided(strict, lenient=lenient)
            failure = self._failure(f"start: %json {text}\n")
            if failure is None:
                return text
            if "nsatisfiable" in failure:
                raise json_schema.SchemaError(failure)
        given_up: tuple[str, ...] = ()
        for step in _LOOSENING_STEPS:
            given_up += step
            text = _guided(_without_keywords(strict, frozenset(given_up)), lenient=True)
            if self._failure(f"start: %json {text}\n") is None:
                logger.info("a JSON schema is enforced without %s: %s", ", ".join(given_up), failure)
                return text
        kinds = sorted(json_schema.types_of(schema, schema))
        logger.warning("a JSON schema is enforced by its type only: %s", failure)
        return _guided({"type": kinds} if kinds else True, lenient=True)

    def _known_failure(self, grammar: str) -> str | None:
        """`_failure`, cached: an agent sends the same tools with every request."""
        key = hashlib.sha256(grammar.encode("utf-8", "surrogatepass")).digest()
        with self._lock:
            if key in self._failures:
                self._failures.move_to_end(key)
                return self._failures[key]
        failure = self._failure(grammar)
        with self._lock:
            self._failures[key] = failure
            if len(self._failures) > _CACHE_ENTRIES:
                self._failures.popitem(last=False)
        return failure

    def _failure(self, grammar: str) -> str | None:
        """The compiler's message, None if it accepts the grammar."""
        try:
            grammar.encode()
        except UnicodeEncodeError:
            return "a name is not valid Unicode"
        is_error, messages = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, limits=self._limits)
        if not is_error:
            return None
        message = str(messages[0])
        first = message.split("\n", 1)[0] if "regex parse error" not in message else message.split("\n   1 |", 1)[0]
        return first.split("failed to compile JSON schema: ", 1)[-1]


def _token(token_id: int | None) -> str:
    """A token by its id: exact, whatever characters its name has."""
    return f"<[{token_id}]>"


def _guided(schema: Any, *, lenient: bool) -> str:
    options = {"whitespace_flexible": True, "whitespace_pattern": _WHITESPACE, "lenient": lenient}
    if schema is True:
        schema = {}
    if schema is False:
        return "false"
    return json.dumps({**schema, "x-guidance": options}, ensure_ascii=True)


def _as_object(schema: Any) -> Any:
    """Tool arguments are an object even where the schema forgets to say so."""
    if isinstance(schema, dict) and not json_schema.types_of(schema, schema):
        return {**schema, "type": "object"}
    return schema


_OPEN_ENDED = frozenset(
    {"additionalProperties", "patternProperties", "unevaluatedProperties"}
    | {"allOf", "anyOf", "oneOf", "not", "if", "$ref"}
)


def _close_objects(schema: Any) -> Any:
    """Objects with listed properties and no word on others take no others: what comes out still validates, and a
    small model does not wander off into properties of its own. Left alone where composition could need them open.
    """
    if '"allOf"' in json.dumps(schema):
        return schema
    return _map_schemas(
        schema,
        lambda node: (
            {**node, "additionalProperties": False}
            if "properties" in node
            and not _OPEN_ENDED & node.keys()
            and set(node.get("required", ())) <= node["properties"].keys()
            else node
        ),
    )


def _without_remote_references(schema: Any) -> Any:
    """References that leave the document are never fetched: such a place takes any value."""

    def loosen(node: dict[str, Any]) -> dict[str, Any]:
        reference = node.get("$ref")
        if isinstance(reference, str) and not reference.startswith("#"):
            return {key: value for key, value in node.items() if key != "$ref"}
        return node

    return _map_schemas(schema, loosen)


def _without_keywords(schema: Any, keywords: frozenset[str]) -> Any:
    return _map_schemas(schema, lambda node: {k: v for k, v in node.items() if k not in keywords})


def _map_schemas(node: Any, change: Any) -> Any:
    """Apply `change` to every schema object of a document, innermost first; data (`enum`, `const`, …) stays."""
    if not isinstance(node, dict):
        return node
    mapped: dict[str, Any] = {}
    for key, value in node.items():
        if key in ("enum", "const", "default", "examples", "required", "type"):
            mapped[key] = value
        elif key in ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas") and isinstance(
            value, dict
        ):
            mapped[key] = {name: _map_schemas(nested, change) for name, nested in value.items()}
        elif isinstance(value, list):
            mapped[key] = [_map_schemas(nested, change) for nested in value]
        else:
            mapped[key] = _map_schemas(value, change)
    return change(mapped)


def _param_of(request: Request) -> str:
    return "tools" if request.tool_choice.mode in ("required", "named") else "response_format"

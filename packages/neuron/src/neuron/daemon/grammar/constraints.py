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
from typing import Any

import llguidance
import msgspec
from cortex_core.conversation import Request, ToolDefinition
from cortex_core.errors import invalid

from neuron.daemon.grammar import json_schema, schema_rewriting
from neuron.daemon.grammar.grammar_cache import ByteBoundedCache
from neuron.daemon.grammar.schema_graph import demands
from neuron.daemon.grammar.schema_types import types_of
from neuron.daemon.text import limits
from neuron.daemon.text.markers import MarkerPair
from neuron.daemon.text.prompts import Prompt, offered_tools
from neuron.protocol import GRAMMAR_LIMITS, GrammarSpec

logger = logging.getLogger(__name__)

# One space, or one line break with an indent: enough for every usual layout, and too little for a small model to
# lose itself in blanks. Matched at most once in each place.
_WHITESPACE = r"( |\n {0,24})"
_MAX_CALLS = 16
_SHOWN_CHARACTERS = 300
_FREE_TEXT = r"/(.|\n)*/"

_PATTERNS = ("pattern", "patternProperties", "propertyNames", "format")

# What llguidance cannot compile and lenient mode does not ignore, in the order in which it is given up.
_LOOSENING_STEPS: tuple[tuple[str, ...], ...] = (
    _PATTERNS,
    ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties", "multipleOf"),
    ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    ("not", "if", "then", "else", "dependentRequired", "dependentSchemas", "unevaluatedProperties", "$schema"),
    ("allOf", "oneOf", "unevaluatedItems", "$dynamicRef", "$anchor", "$dynamicAnchor"),
)


class _Compiled(msgspec.Struct, frozen=True):
    """text: JSON that llguidance accepts, None for a schema that is refused with `fault`."""

    text: str | None
    fault: str
    num_bytes: int
    num_nodes: int


class _Spent:
    """What the schemas of one request have taken."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.num_nodes = 0


class GrammarBuilder:
    """Builds and checks the grammars of one model. Thread-safe.

    reasoning, tool_calls: the model's markers. A marker that is a vocabulary entry is demanded as that token.
    """

    def __init__(self, reasoning: MarkerPair | None, tool_calls: MarkerPair) -> None:
        self._reasoning = reasoning
        self._tool_calls = tool_calls
        self._limits = llguidance.LLParserLimits(verbose_errors=False, **GRAMMAR_LIMITS)
        self._schemas: ByteBoundedCache[_Compiled] = ByteBoundedCache(limits.MAX_CACHED_GRAMMAR_BYTES)
        self._failures: ByteBoundedCache[str] = ByteBoundedCache(limits.MAX_CACHED_GRAMMAR_BYTES // 16)

    def build(self, request: Request, prompt: Prompt) -> GrammarSpec | None:
        """The grammar of one request, None where anything may be said.

        Raises `ApiError` with the field's path: an invalid schema, a tool that is not among the tools.
        """
        self._check_choice(request)
        rules: list[str] = []
        alternatives: list[str] = []
        spent = _Spent()
        if request.response_format is not None:
            schema: Any = {"type": "object"}
            if request.response_format.kind == "json_schema":
                schema = request.response_format.schema
                schema = True if schema is None else schema
            compiled = self._compiled(schema, "response_format.json_schema.schema", spent)
            rules.append(f"document: %json {compiled}")
            alternatives.append("document")
        mode = request.tool_choice.mode
        tools = offered_tools(request)
        if (mode in ("required", "named") and tools) or (alternatives and mode == "auto" and tools):
            rules += self._call_rules(request, tools, spent)
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
        if failure:
            raise invalid(f"the requested output cannot be constrained: {failure}", param=_param_of(request))
        return GrammarSpec(grammar, request.client_param(_param_of(request)) or "")

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

    def _call_rules(self, request: Request, tools: tuple[ToolDefinition, ...], spent: _Spent) -> list[str]:
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
            compiled = self._compiled(schema, param, spent, is_object=True)
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

    def _compiled(self, schema: Any, param: str, spent: _Spent, *, is_object: bool = False) -> str:
        """`schema` as JSON text that llguidance accepts; cached by content. Raises `ApiError`.

        is_object: it is an object's schema, even where it forgets to say so. spent: what this request has taken so far.
        """
        try:
            text = json.dumps(schema)
        except (TypeError, ValueError, RecursionError) as exc:
            raise invalid(f"Invalid schema: {exc}", param=param) from exc
        key = hashlib.sha256(text.encode()).digest() + bytes([is_object])
        known = self._schemas.get(key)
        if known is None:
            known = self._compile(schema, len(text), is_object=is_object)
            self._schemas.put(key, known, len(known.text or known.fault))
        if known.text is None:
            raise invalid(f"Invalid schema: {known.fault}", param=param)
        spent.num_bytes += known.num_bytes
        spent.num_nodes += known.num_nodes
        for what, num, most in (
            ("bytes", spent.num_bytes, limits.MAX_SCHEMA_BYTES),
            ("subschemas", spent.num_nodes, limits.MAX_REQUEST_SCHEMA_NODES),
        ):
            if num > most:
                raise invalid(f"Invalid schema: up to here the schemas have {num} {what}, at most {most}", param=param)
        return known.text

    def _compile(self, schema: Any, num_bytes: int, *, is_object: bool) -> _Compiled:
        try:
            size = json_schema.check(schema)
            text = self._accepted(_as_object(schema) if is_object else schema, size.num_nodes)
        except json_schema.SchemaError as exc:
            return _Compiled(None, _shown(str(exc)), num_bytes, 0)
        return _Compiled(text, "", num_bytes, size.num_nodes)

    def _accepted(self, schema: Any, num_nodes: int) -> str:
        """Raises `SchemaError` for a schema that nothing can satisfy."""
        strict = _within_reach(schema_rewriting.closed(schema_rewriting.self_contained(schema)))
        for lenient in (False, True):
            text = _guided(strict, lenient=lenient)
            failure = self._failure(f"start: %json {text}\n")
            if not failure:
                return text
            if "nsatisfiable" in failure:
                raise json_schema.SchemaError(failure)
        given_up: tuple[str, ...] = ()
        for number, step in enumerate(_LOOSENING_STEPS, 1):
            given_up += step
            if num_nodes > limits.MAX_SCHEMA_NODES_TRIED_OFTEN and number < len(_LOOSENING_STEPS):
                continue
            text = _guided(schema_rewriting.without_keywords(strict, frozenset(given_up)), lenient=True)
            if not self._failure(f"start: %json {text}\n"):
                logger.info("a JSON schema is enforced without %s: %s", ", ".join(given_up), failure)
                return text
        kinds = sorted(types_of(schema, schema))
        logger.warning("a JSON schema is enforced by its type only: %s", failure)
        return _guided({"type": kinds} if kinds else True, lenient=True)

    def _known_failure(self, grammar: str) -> str:
        """`_failure`, cached: an agent sends the same tools with every request."""
        key = hashlib.sha256(grammar.encode("utf-8", "surrogatepass")).digest()
        failure = self._failures.get(key)
        if failure is None:
            failure = self._failure(grammar)
            self._failures.put(key, failure, len(failure))
        return failure

    def _failure(self, grammar: str) -> str:
        """The compiler's message, empty if it accepts the grammar."""
        try:
            grammar.encode()
        except UnicodeEncodeError:
            return "a name is not valid Unicode"
        is_error, messages = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, limits=self._limits)
        if not is_error:
            return ""
        message = str(messages[0])
        first = message.split("\n", 1)[0] if "regex parse error" not in message else message.split("\n   1 |", 1)[0]
        return _shown(first.split("failed to compile JSON schema: ", 1)[-1] or "it cannot be compiled")


def _shown(fault: str) -> str:
    """Faults quote what the client wrote, which may be long."""
    return fault if len(fault) <= _SHOWN_CHARACTERS else fault[:_SHOWN_CHARACTERS] + "…"


def _within_reach(schema: Any) -> Any:
    """The schema without what the compiler could only work out in too much time, or on too deep a stack."""
    asked = demands(schema)
    given_up: tuple[str, ...] = ()
    if asked.levels > limits.MAX_SCHEMA_LEVELS:
        given_up += ("$ref",)
    if (
        asked.patterns > limits.MAX_CONJOINED_PATTERNS
        or asked.pattern_properties > limits.MAX_PATTERN_PROPERTIES
        or asked.matched_values > limits.MAX_MATCHED_ENUM_VALUES
        or asked.folded_classes > limits.MAX_FOLDED_CLASSES
    ):
        given_up += _PATTERNS
    if asked.merge_work > limits.MAX_MERGE_WORK:
        given_up += (*_PATTERNS, "allOf", "required")
    if asked.multiple_states > limits.MAX_MULTIPLE_STATES:
        given_up += ("multipleOf",)
    if not given_up:
        return schema
    logger.info("a JSON schema is enforced without %s: it asks for too much at once (%s)", ", ".join(given_up), asked)
    return schema_rewriting.without_keywords(schema, frozenset(given_up))


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
    if isinstance(schema, dict) and not types_of(schema, schema):
        return {**schema, "type": "object"}
    return schema


def _param_of(request: Request) -> str:
    return "tools" if request.tool_choice.mode in ("required", "named") else "response_format"

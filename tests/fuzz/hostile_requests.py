"""Requests, templates and answers that ask for more than they say, drawn by hypothesis.

Sizes are drawn beside what is repeated, so that small draws make large bodies: up to every limit, and beyond it. One or
two fields of a request are hostile: what is refused for one shows nothing of the others.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

TEMPLATES = Path(__file__).parents[1] / "neuron/daemon/prompt/templates"

Draw = Callable[[st.SearchStrategy[Any]], Any]

UNITS = st.sampled_from(
    ["a", " ", "\n", "ab", "é", "\U0001f600", "<think>", "<tool_call>", "{{ x }}", "{%", "\\", '"', "\x00", "\u2028"]
)
FEW, SOME, MANY = (1, 2, 3, 7), (1, 5, 40, 400), (1, 30, 1_000, 20_000)
EDGES = (0, 1, -1, 2**31, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e308, 3.0)
MAX_BODY_CHARACTERS = 1_000_000


def mostly(good: Any, *others: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from((*[good] * 5 * max(1, len(others)), *others))


def sizes(*usual: int, beyond: tuple[int, ...] = ()) -> st.SearchStrategy[int]:
    """Mostly the first of the usual ones."""
    return st.sampled_from((*[usual[0]] * 6, *usual * 2, *beyond))


def texts(*counts: int) -> st.SearchStrategy[str]:
    ends = st.sampled_from(["", "b", "x"])
    return st.builds(lambda unit, count, end: unit * count + end, UNITS, sizes(*counts), ends)


def weight(value: Any, known: dict[int, int]) -> int:
    """About how many characters of JSON it is. What is repeated is one object, and looked at once."""
    if isinstance(value, str):
        return len(value) + 3
    if not isinstance(value, list | dict):
        return 6
    found = known.get(id(value))
    if found is None:
        parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        if len(parts) > 1 and all(part is parts[0] for part in parts):
            found = 2 + len(parts) * weight(parts[0], known)
        else:
            found = 2 + sum(weight(part, known) for part in parts)
        known[id(value)] = found
    return found


# ---------------------------------------------------------------- schemas

NAMES = st.sampled_from(["a", "b", "city", "x" * 60, "é", "", "a/b", "~"])
PLACES = st.sampled_from(["#", "#/$defs/a", "#/$defs/b", "#a", "http://x/y", "#/%24defs/a"])
UNUSUAL_PLACES = st.sampled_from(
    ["#/anyOf/0", "#/x-free", "#/nowhere", "#/anyOf/\u00b2", "#/anyOf/" + "1" * 5000, "#/$defs" + "/a" * 50]
)
REFERENCES = st.one_of(PLACES, PLACES, UNUSUAL_PLACES)
LONG_PATTERNS = ("(?i:[\x00-\U0010ffff])" * 3, "(" * 50 + ")" * 50, "|".join(f"w{n}" for n in range(200)))
PATTERNS = st.one_of(
    st.sampled_from(["^a+$", "(a|b)*a(a|b){12}", "(a{1,100}){1,100}", "^.*a.{30}$", "(?=a)b", "\\p{L}+", "(a|aa)+$"]),
    st.sampled_from(["(", "[", "a**", "a{99999}", "(?i:[a-z]+)", *LONG_PATTERNS]),
    st.text(alphabet="ab(){}[]|*+?\\^$.,1-", max_size=12),
)
TYPES = st.sampled_from(["string", "integer", "number", "boolean", "null", "object", "array"] * 5 + ["nonsense"])
JUNK = st.sampled_from([None, 0, "x", [], {}, [[]], {"a": 5}, True, 1e300])
VALUES = st.one_of(JUNK, st.sampled_from(["v", "w", 1, 2.5, [1], {"k": "v"}]))
FORMATS = st.sampled_from(["date-time", "uri", "email", "ipv6", "no"])

LEAVES = st.one_of(
    *[st.builds(lambda kind: {"type": kind}, TYPES)] * 5,
    *[st.builds(lambda reference: {"$ref": reference}, PLACES)] * 3,
    st.booleans(),
    st.just({}),
    st.builds(lambda kinds: {"type": kinds}, st.lists(TYPES, max_size=3)),
    st.builds(lambda reference: {"$ref": reference}, REFERENCES),
    st.builds(lambda pattern: {"type": "string", "pattern": pattern}, PATTERNS),
    st.builds(lambda values, count: {"enum": values * count}, st.lists(VALUES, max_size=4), sizes(1, 10, 3_000)),
    st.builds(lambda value: {"const": value}, VALUES),
    st.builds(
        lambda key, number: {"type": "string", key: number},
        st.sampled_from(["minLength", "maxLength", "minItems", "maxItems", "maxProperties"]),
        mostly(3, *EDGES),
    ),
    st.builds(
        lambda key, number: {"type": "number" if isinstance(number, float) else "integer", key: number},
        st.sampled_from(["minimum", "maximum", "exclusiveMinimum", "multipleOf"]),
        st.sampled_from((*EDGES, 7, 97, 99_991)),
    ),
    st.builds(lambda form: {"type": "string", "format": form}, FORMATS),
    JUNK,
)


def compound(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    listed = st.builds(lambda parts, count: parts * count, st.lists(inner, min_size=1, max_size=3), sizes(*SOME))
    mapped = st.builds(
        lambda part, names, count: {f"{name}{n or ''}": part for name in names for n in range(count)},
        inner,
        st.lists(NAMES, min_size=1, max_size=3),
        sizes(1, 4, 60),
    )
    return st.fixed_dictionaries(
        {},
        optional={
            "type": TYPES,
            "properties": mapped,
            "required": st.lists(NAMES, max_size=3),
            "items": st.one_of(inner, st.lists(inner, max_size=2)),
            "anyOf": listed,
            "allOf": listed,
            "oneOf": listed,
            "prefixItems": listed,
            "additionalProperties": inner,
            "patternProperties": st.dictionaries(PATTERNS, inner, max_size=3),
            "propertyNames": inner,
            "not": inner,
            "if": inner,
            "then": inner,
            "$ref": REFERENCES,
            "$anchor": st.just("a"),
            "$id": st.sampled_from(["http://x/y", "#a"]),
            "x-free": inner,
            "pattern": PATTERNS,
            "enum": st.lists(VALUES, max_size=3),
        },
    )


def _chain(count: int, link: str, end: Any) -> dict[str, Any]:
    links: dict[str, Callable[[Any], Any]] = {
        "properties": lambda r: {"type": "object", "properties": {"a": r}},
        "anyOf": lambda r: {"anyOf": [r, r, {"type": "null"}]},
        "allOf": lambda r: {"allOf": [r, r]},
        "pattern": lambda r: {"pattern": "^a+", **r},
        "items": lambda r: {"type": "array", "items": r},
        "$ref": lambda r: r,
    }
    definitions = {f"d{n}": links[link]({"$ref": f"#/$defs/d{n + 1}"}) for n in range(count)}
    return {"$defs": {**definitions, f"d{count}": end}, "$ref": "#/$defs/d0"}


CHAINS = st.builds(
    _chain,
    sizes(3, 40, 300, 1_200),
    st.sampled_from(["properties", "anyOf", "allOf", "pattern", "items", "$ref"]),
    st.one_of(*[st.just({"type": "string"})] * 4, st.just({"$ref": "#/$defs/d0"}), LEAVES),
)
FANS = st.builds(
    lambda key, reference, count, more: {key: [{"$ref": reference}] * count, **more},
    st.sampled_from(["anyOf", "anyOf", "oneOf", "allOf"]),
    st.one_of(st.just("#"), PLACES, UNUSUAL_PLACES),
    sizes(40, 3, 400),
    st.sampled_from([{}, {"$defs": {"a": {"anyOf": [{"$ref": "#"}, {"type": "string"}]}, "b": {}}}, {"pattern": "^a"}]),
)
CONJOINED = st.builds(
    lambda patterns, count: {
        "type": "string",
        "allOf": [{"pattern": pattern.replace("12", str(n + 2))} for n in range(count) for pattern in patterns],
    },
    st.lists(mostly("(a|b)*a(a|b){12}", "^[a-z]{3,12}x", "^.*a.{12}$", "("), min_size=1, max_size=3),
    sizes(3, 10, 30),
)
SORTED = st.builds(
    lambda count: {"type": "object", "patternProperties": {f"^x{n:03}$": {} for n in range(count)}}, sizes(3, 64, 65)
)
WIDE = st.builds(
    lambda count, part: {"type": "object", "properties": {f"p{n}": part for n in range(count)}},
    sizes(10, 200, 1_000, 1_001),
    LEAVES,
)
BODIES = st.recursive(LEAVES, compound, max_leaves=8)
WITH_DEFINITIONS = st.builds(
    lambda schema, a, b: {**(schema if isinstance(schema, dict) else {}), "$defs": {"a": a, "b": b}},
    BODIES,
    BODIES,
    LEAVES,
)
SCHEMAS = st.one_of(BODIES, WITH_DEFINITIONS, CHAINS, FANS, CONJOINED, SORTED, WIDE)
OBJECTS = SCHEMAS.map(lambda schema: schema if isinstance(schema, dict) else {"anyOf": [schema] * 3})

# ---------------------------------------------------------------- requests

TOOL_NAMES = mostly("t0", "t1", "f" * 256, "f" * 257, 'odd "name"')
PART = st.builds(lambda text: {"type": "text", "text": text}, texts(1, 20, 500))
CONTENT = st.one_of(
    texts(3, 30, 1_000, 100_000),
    st.builds(lambda part, count: [part] * count, PART, sizes(*FEW, 2_000)),
    st.none(),
)
ARGUMENTS = st.sampled_from(["{}", '{"a": 1}', "", "no JSON", '{"a": ' + "[" * 500 + "]" * 500 + "}", "[" * 3000])
CALL = st.builds(
    lambda name, arguments: {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}},
    TOOL_NAMES,
    ARGUMENTS,
)
MESSAGE = st.one_of(
    st.builds(
        lambda role, content: {"role": role, "content": content},
        mostly("user", "system", "assistant", "developer", "nobody"),
        CONTENT,
    ),
    st.builds(
        lambda call, count, content, thought: {
            "role": "assistant",
            "content": content,
            "reasoning_content": thought,
            "tool_calls": [call] * count,
        },
        CALL,
        sizes(*FEW, 300),
        CONTENT,
        texts(1, 30, 1_000),
    ),
    st.builds(lambda content: {"role": "tool", "tool_call_id": "c1", "content": content}, CONTENT),
)
MESSAGES = st.builds(
    lambda head, parts, count: [head, *parts * count],
    st.builds(lambda content: {"role": "user", "content": content}, CONTENT),
    st.lists(MESSAGE, max_size=3),
    sizes(1, 3, 40, 700, beyond=(6_000,)),
)
BENIGN = [{"role": "user", "content": "hello"}]
STOPS = st.one_of(
    st.none(),
    st.lists(texts(1, 4, 100, 1_023, 2_000), max_size=5),
    st.builds(lambda unit, count: [unit + str(n) for n in range(count)], UNITS, sizes(3, 64, 65)),
)
BIASES = st.one_of(
    st.just({}),
    st.builds(lambda count: {str(n): 1 for n in range(count)}, sizes(2, 300, 1_024, 1_025)),
    mostly({"5": -100}, {"-1": 1}, {"\u00b2": 1}, {"9" * 40: 1}, {"1": 101}, {"99999999": 1}, [], {"1": None}),
)
NUMBERS = st.fixed_dictionaries(
    {},
    optional={
        "max_tokens": mostly(7, *EDGES),
        "n": mostly(1, 2, 128, 129),
        "top_k": mostly(3, *EDGES),
        "seed": mostly(5, *EDGES),
        "temperature": mostly(1, 0, 1e308, -1),
        "stop": STOPS,
        "logit_bias": BIASES,
        "chat_template_kwargs": mostly(
            None, {"enable_thinking": True}, {"messages": []}, {"raise_exception": 1}, {"k": "x" * 70_000}
        ),
    },
)
TOOLS = st.builds(
    lambda schemas, names, count: [
        {"type": "function", "function": {"name": f"{name}{n or ''}", "description": "d", "parameters": schema}}
        for name, schema in zip(names, schemas, strict=False)
        for n in range(count)
    ],
    st.lists(OBJECTS, min_size=1, max_size=3),
    st.lists(TOOL_NAMES, min_size=3, max_size=3),
    sizes(1, 4, 40, 1_025),
)
CHOICES = st.sampled_from(["required", "required", "auto", "none", {"type": "function", "function": {"name": "t0"}}])


@st.composite
def chat(draw: Draw) -> dict[str, Any]:
    kind = draw(st.sampled_from(["messages", "numbers", *["schema"] * 3, *["tools"] * 3]))
    body: dict[str, Any] = {"model": "m", "messages": draw(MESSAGES) if kind == "messages" else BENIGN}
    if kind == "numbers" or draw(st.integers(0, 5)) == 0:
        body |= draw(NUMBERS)
    if kind == "schema":
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "s", "schema": draw(SCHEMAS)}}
    elif kind == "tools":
        body["tools"], body["tool_choice"] = draw(TOOLS), draw(CHOICES)
    return body


def as_messages(body: dict[str, Any]) -> dict[str, Any]:
    """The nearest thing in Anthropic's dialect."""
    given = {"max_tokens": 5, **body}
    given["stop_sequences"] = given.pop("stop", None)
    functions = [tool["function"] for tool in given.get("tools", ())]
    given["tools"] = [{"name": each["name"], "input_schema": each["parameters"]} for each in functions]
    choice = given.pop("tool_choice", None)
    if choice in ("required", "auto"):
        given["tool_choice"] = {"type": "any" if choice == "required" else "auto"}
    if "response_format" in given:
        given["output_format"] = {"type": "json_schema", **given.pop("response_format")["json_schema"]}
    given["messages"] = [
        {"role": "user" if message["role"] == "developer" else message["role"], "content": message["content"] or "x"}
        for message in given["messages"]
        if message["role"] != "tool"
    ]
    return given


def as_responses(body: dict[str, Any]) -> dict[str, Any]:
    given = {**body, "input": [message for message in body["messages"] if message["role"] != "tool"]}
    given["tools"] = [{"type": "function", **tool["function"]} for tool in given.get("tools", ())]
    if isinstance(given.get("tool_choice"), dict):
        given["tool_choice"] = {"type": "function", "name": "t0"}
    if "response_format" in given:
        given["text"] = {"format": {"type": "json_schema", **given.pop("response_format")["json_schema"]}}
    return given


@st.composite
def completion(draw: Draw) -> dict[str, Any]:
    few = st.lists(mostly(5, 0, 1, 7.0, 2**31, -1), max_size=3)
    ids = st.builds(lambda part, count: part * count, few, sizes(*MANY))
    text = texts(3, 30, 1_000, 100_000)
    several = st.builds(lambda part, count: [part] * count, st.one_of(text, ids), sizes(1, 3, 128, 129))
    return {
        "model": "m",
        "prompt": draw(st.one_of(text, ids, several)),
        "suffix": draw(mostly(None, "", "x")),
        "echo": draw(st.booleans()),
        "logprobs": draw(mostly(None, 0, 5, 6)),
        **(draw(NUMBERS) if draw(st.booleans()) else {}),
    }


DIALECTS = ("chat_completion", "messages", "responses", "completion", "count_messages", "count_responses")


@st.composite
def requests(draw: Draw) -> tuple[str, bytes]:
    """A dialect, and a body."""
    dialect = draw(st.sampled_from((*DIALECTS, *["chat_completion"] * 4)))
    if dialect == "completion":
        body = draw(completion())
    else:
        body = draw(chat())
        if dialect.endswith("messages"):
            body = as_messages(body)
        elif dialect.endswith("responses"):
            body = as_responses(body)
    assume(weight(body, {}) <= MAX_BODY_CHARACTERS)
    return dialect, json.dumps(body).encode()


# ---------------------------------------------------------------- templates and answers

SNIPPETS = st.sampled_from(
    [
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
        "{{ messages | tojson }}",
        "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}",
        "{% for t in tools or [] %}{{ t.function.parameters }}{% endfor %}",
        "{% set n = namespace(x='') %}{% for m in messages[::-1] %}{% set n.x = n.x ~ m.role %}{% endfor %}{{ n.x }}",
        "{% if messages[0].role == 'system' %}{{ raise_exception('no: ' ~ messages[0].content) }}{% endif %}",
        "{{ messages[0].content.split('a') | length }}{{ messages[-1].content | trim | upper }}",
        "{% if (messages | length) % 2 %}{{ raise_exception('even') }}{% endif %}",
        "{{ range(99) | list | length }}{{ '%s' % messages[0].role }}",
        "{{ undefined.attribute }}",
        "{{ messages[0].content[0].text }}",
        "<think>",
    ]
)
WHOLE = st.sampled_from(sorted(file.stem for file in TEMPLATES.glob("*.jinja")))
TEMPLATE_SOURCES = st.one_of(
    WHOLE.map(lambda name: (TEMPLATES / f"{name}.jinja").read_text("utf-8")),
    st.lists(SNIPPETS, min_size=1, max_size=4).map("".join),
)
CALL_PIECES = ("<tool_call>\n", "</tool_call>", '{"name": "t0", "arguments": {"a": ', '{"name": "t0", "arguments": ')
XML_PIECES = ("<function=t0>", "<function=", "<parameter=a>\n", "</parameter>", "</function>", "\n<parameter=b>")
MARKS = ("[", "{", '"', "\\", "}", "]", ",", ": ", "null", "1" * 50, " ", "\n", "    ", "<", "a", "aaab")
PIECES = st.sampled_from((*CALL_PIECES, *XML_PIECES, *MARKS, "<think>", "</think>", "é", "\U0001f600"))
OUTPUTS = st.lists(st.tuples(PIECES, sizes(1, 3, 50, 1_500)), max_size=8).map(
    lambda pieces: "".join(piece * count for piece, count in pieces)[:20_000]
)

"""What a JSON Schema would ask of a grammar compiler, found before it is asked.

Two things grow beyond what the size of a schema says: how deep subschemas lie within each other once references are
followed, which the compiler walks on its stack; and how much one value has to satisfy at once, which it works out by
intersecting automata. Both are bounds from above, found in time linear in the schema (Tarjan 1972, strongly connected
components).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sized
from typing import Any, NamedTuple

import msgspec

from neuron.text.json_schema import resolve, subschemas

Node = dict[str, Any]
Edges = Callable[[Node], list[Node]]

_IGNORES_CASE = re.compile(r"\(\?[a-zA-Z]*i")
_MOST = 2**31
"""Where counting stops: branches that share definitions multiply."""
_MOST_BITS = 64


class Demands(msgspec.Struct, frozen=True):
    """levels: schemas within each other. patterns: regular expressions that one string has to match.
    pattern_properties: those that one object has to be sorted by. matched_values: of an `enum`, where they have to
    match a regular expression. folded_classes: classes of characters in regular expressions that ignore case.
    merge_work: of making one schema of several that hold at once, in comparisons. multiple_states: of the automata that
    tell multiples."""

    levels: int = 0
    patterns: int = 0
    pattern_properties: int = 0
    matched_values: int = 0
    folded_classes: int = 0
    merge_work: int = 0
    multiple_states: int = 0


class _Total(NamedTuple):
    """What holds for one value at once. names: of properties. multiple_bits: the length of what it has to divide by."""

    patterns: int = 0
    pattern_properties: int = 0
    values: int = 0
    names: int = 0
    multiple_bits: int = 0


_NOTHING = _Total()


def demands(root: Any) -> Demands:
    """Of a schema that `json_schema.check` has passed."""
    if not isinstance(root, dict):
        return Demands()
    references = _References(root)
    nodes = references.nodes
    totals = _conjunctions(nodes, references.targets)
    merge_work = multiple_states = 0
    for node in nodes:
        total, own = totals[id(node)], _own(node)
        if own != _NOTHING or "allOf" in node or ("$ref" in node and len(node) > 1):
            merge_work += total.pattern_properties**2 + total.names
        if own.multiple_bits:
            multiple_states += 2 ** min(total.multiple_bits, _MOST_BITS)
    return Demands(
        levels=_levels(nodes, references.targets),
        patterns=max(total.patterns for total in totals.values()),
        pattern_properties=max(total.pattern_properties for total in totals.values()),
        matched_values=max((total.values for total in totals.values() if total.patterns), default=0),
        folded_classes=sum(map(_folded_classes, nodes)),
        merge_work=merge_work,
        multiple_states=multiple_states,
    )


def _folded_classes(node: Node) -> int:
    by_pattern = node.get("patternProperties")
    patterns = [node.get("pattern"), *(by_pattern if isinstance(by_pattern, dict) else ())]
    return sum(p.count("[") for p in patterns if isinstance(p, str) and _IGNORES_CASE.search(p))


def _inner(node: Node) -> list[Node]:
    return [child for child in subschemas(node) if isinstance(child, dict)]


class _References:
    """All schemas of a document, and where their references lead: by place, or by anchor to whichever has it."""

    def __init__(self, root: Node) -> None:
        self._root = root
        self._anchored: dict[str, list[Node]] = {}
        self.nodes = [root]
        seen = {id(root)}
        for node in self.nodes:  # grows on the way
            for key in ("$anchor", "$dynamicAnchor"):
                if isinstance(node.get(key), str):
                    self._anchored.setdefault(f"#{node[key]}", []).append(node)
            for child in (*_inner(node), *self.targets(node)):
                if id(child) not in seen:
                    seen.add(id(child))
                    self.nodes.append(child)

    def targets(self, node: Node) -> list[Node]:
        reference = node.get("$ref")
        if not isinstance(reference, str) or not reference.startswith("#"):
            return []
        target = resolve(reference, self._root)
        return [target] if isinstance(target, dict) else self._anchored.get(reference, [])


def _levels(nodes: list[Node], targets: Edges) -> int:
    """The longest way through the schema on which no subschema comes twice; of a cycle, all of it is counted."""
    edges = {id(node): [*_inner(node), *targets(node)] for node in nodes}
    longest: dict[int, int] = {}
    for component in _components(nodes, lambda node: edges[id(node)]):
        inside = {id(node) for node in component}
        below = max(
            (longest[id(child)] for node in component for child in edges[id(node)] if id(child) not in inside),
            default=0,
        )
        for node in component:
            longest[id(node)] = below + len(component)
    return max(longest.values())


def _conjunctions(nodes: list[Node], targets: Edges) -> dict[int, _Total]:
    """For each subschema, by its identity."""

    def branches(node: Node, key: str) -> list[Node]:
        listed = node.get(key)
        return [child for child in listed if isinstance(child, dict)] if isinstance(listed, list) else []

    def in_place(node: Node) -> list[Node]:
        return [*targets(node), *(c for key in ("allOf", "anyOf", "oneOf") for c in branches(node, key))]

    totals: dict[int, _Total] = {}
    for component in _components(nodes, in_place):
        for node in component:  # of a cycle, each adds what it says itself
            parts = [_own(node)]
            parts += [totals.get(id(child), _NOTHING) for child in (*targets(node), *branches(node, "allOf"))]
            for key in ("anyOf", "oneOf"):  # one branch at a time
                options = [totals.get(id(child), _NOTHING) for child in branches(node, key)]
                if options:
                    parts.append(_Total(*map(max, zip(*options, strict=True))))
            totals[id(node)] = _Total(*(min(sum(column), _MOST) for column in zip(*parts, strict=True)))
    return totals


def _own(node: Node) -> _Total:
    def length(key: str, kind: type[Sized]) -> int:
        value: Any = node.get(key)
        return len(value) if isinstance(value, kind) else 0

    multiple = node.get("multipleOf")
    return _Total(
        patterns=("pattern" in node) + ("format" in node),
        pattern_properties=length("patternProperties", dict),
        values=length("enum", list),
        names=length("properties", dict) + length("required", list),
        multiple_bits=_bits(multiple) if isinstance(multiple, int) and not isinstance(multiple, bool) else 0,
    )


def _bits(multiple: int) -> int:
    return min(multiple.bit_length(), _MOST_BITS)


def _components(nodes: list[Node], edges: Edges) -> Iterator[list[Node]]:
    """Strongly connected components, each after all those that it leads to."""
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    done: set[int] = set()
    stack: list[Node] = []
    for start in nodes:
        if id(start) in index:
            continue
        index[id(start)] = low[id(start)] = len(index)
        stack.append(start)
        path = [(start, iter(edges(start)))]
        while path:
            node, children = path[-1]
            for child in children:
                if id(child) not in index:
                    index[id(child)] = low[id(child)] = len(index)
                    stack.append(child)
                    path.append((child, iter(edges(child))))
                    break
                if id(child) not in done:
                    low[id(node)] = min(low[id(node)], index[id(child)])
            else:
                path.pop()
                if path:
                    above = id(path[-1][0])
                    low[above] = min(low[above], low[id(node)])
                if low[id(node)] == index[id(node)]:
                    component: list[Node] = []
                    while not component or component[-1] is not node:
                        component.append(stack.pop())
                    done.update(map(id, component))
                    yield component

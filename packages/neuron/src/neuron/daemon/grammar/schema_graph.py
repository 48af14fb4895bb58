"""Cost of a JSON Schema to a grammar compiler, found before it is compiled.

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

from neuron.daemon.grammar.json_schema import IN_PLACE_LISTS, resolve, subschemas

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
    graph = _Graph(root)
    nodes = graph.nodes
    totals = _conjunctions(graph)
    merge_work = multiple_states = 0
    for node in nodes:
        total, own = totals[id(node)], graph.own[id(node)]
        if own != _NOTHING or "allOf" in node or ("$ref" in node and len(node) > 1):
            merge_work += total.pattern_properties**2 + total.names
        if own.multiple_bits:
            multiple_states += 2 ** min(total.multiple_bits, _MOST_BITS)
    return Demands(
        levels=_levels(graph),
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


class _Graph:
    """All schemas of a document, by identity: what stands in each, and where its reference leads (by place, or by
    anchor to whichever has it)."""

    def __init__(self, root: Node) -> None:
        self.nodes = [root]
        self.inner: dict[int, list[Node]] = {}
        self.targets: dict[int, list[Node]] = {}
        self.own: dict[int, _Total] = {}
        anchored: dict[str, list[Node]] = {}
        seen = {id(root)}
        for node in self.nodes:  # grows on the way
            self.own[id(node)] = _own(node)
            self.inner[id(node)] = [child for child in subschemas(node) if isinstance(child, dict)]
            for key in ("$anchor", "$dynamicAnchor"):
                if isinstance(node.get(key), str):
                    anchored.setdefault(f"#{node[key]}", []).append(node)
            reference = node.get("$ref")
            target = resolve(reference, root) if isinstance(reference, str) and reference.startswith("#") else None
            self.targets[id(node)] = [target] if isinstance(target, dict) else []
            for child in (*self.inner[id(node)], *self.targets[id(node)]):
                if id(child) not in seen:
                    seen.add(id(child))
                    self.nodes.append(child)
        for node in self.nodes if anchored else ():
            if not self.targets[id(node)]:
                self.targets[id(node)] = anchored.get(str(node.get("$ref")), [])


def _levels(graph: _Graph) -> int:
    """The longest way through the schema on which no subschema comes twice; of a cycle, all of it is counted."""
    edges = {id(node): [*graph.inner[id(node)], *graph.targets[id(node)]] for node in graph.nodes}
    longest: dict[int, int] = {}
    for component in _components(graph.nodes, lambda node: edges[id(node)]):
        inside = {id(node) for node in component}
        below = max(
            (longest[id(child)] for node in component for child in edges[id(node)] if id(child) not in inside),
            default=0,
        )
        for node in component:
            longest[id(node)] = below + len(component)
    return max(longest.values())


def _branches(node: Node, key: str) -> list[Node]:
    listed = node.get(key)
    return [child for child in listed if isinstance(child, dict)] if isinstance(listed, list) else []


def _conjunctions(graph: _Graph) -> dict[int, _Total]:
    """For each subschema, by its identity."""
    in_place = {
        id(node): [*graph.targets[id(node)], *(c for key in IN_PLACE_LISTS for c in _branches(node, key))]
        for node in graph.nodes
    }
    totals: dict[int, _Total] = {}
    for component in _components(graph.nodes, lambda node: in_place[id(node)]):
        for node in component:  # of a cycle, each adds what it says itself
            own = graph.own[id(node)]
            if not in_place[id(node)]:
                totals[id(node)] = own
                continue
            parts = [own]
            parts += [totals.get(id(c), _NOTHING) for c in (*graph.targets[id(node)], *_branches(node, "allOf"))]
            for key in ("anyOf", "oneOf"):  # one branch at a time
                options = [totals.get(id(child), _NOTHING) for child in _branches(node, key)]
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

"""Grammars of forced tool calls, from their schemas."""

from __future__ import annotations

from typing import Any

from cortex_core.conversation import Request, ToolChoice, ToolDefinition
from neuron.daemon.grammar.constraints import GrammarBuilder
from neuron.daemon.text import limits
from neuron.daemon.text.markers import MarkerPair
from neuron.daemon.text.prompts import Prompt

from tests.neuron.daemon.prompt.checkpoints import ask

# ---------------------------------------------------------------- limits, at them and beyond

NAMES = [f"p{n}" for n in range(limits.MAX_SCHEMA_BRANCHES + 1)]


def forced(*schemas: Any) -> Request:
    tools = tuple(ToolDefinition(f"t{n}", None, schema) for n, schema in enumerate(schemas))
    return ask(tools=tools, tool_choice=ToolChoice("required"))


def builder() -> GrammarBuilder:
    return GrammarBuilder(None, MarkerPair("<tool_call>", "</tool_call>"))


def built(*schemas: Any) -> str:
    spec = builder().build(forced(*schemas), Prompt(token_ids=[1], text="a"))
    assert spec is not None
    return spec.grammar


def chain(length: int, link: Any = None, **last: Any) -> dict[str, Any]:
    """Definitions that each hold the next one as a property, or in the way that `link` says."""
    link = link or (lambda reference: {"type": "object", "properties": {"a": reference}})
    definitions = {f"d{n}": link({"$ref": f"#/$defs/d{n + 1}"}) for n in range(length)}
    return {"$defs": {**definitions, f"d{length}": {"type": "object", **last}}, "$ref": "#/$defs/d0"}


def fanned_out(width: int) -> dict[str, Any]:
    return {"anyOf": [{"$ref": "#"}] * width}

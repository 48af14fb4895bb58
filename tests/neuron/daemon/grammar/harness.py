"""Grammars of forced tool calls, from their schemas."""

from __future__ import annotations

from typing import Any

from cortex_core.conversation import Request, ToolChoice, ToolDefinition
from neuron.daemon.grammar.constraints import GrammarBuilder
from neuron.daemon.text.markers import MarkerPair
from neuron.daemon.text.prompts import Prompt

from tests.neuron.daemon.prompt.checkpoints import ask


def forced(*schemas: Any) -> Request:
    tools = tuple(ToolDefinition(f"t{n}", None, schema) for n, schema in enumerate(schemas))
    return ask(tools=tools, tool_choice=ToolChoice("required"))


def builder() -> GrammarBuilder:
    return GrammarBuilder(None, MarkerPair("<tool_call>", "</tool_call>"))


def built(*schemas: Any) -> str:
    spec = builder().build(forced(*schemas), Prompt(token_ids=[1], text="a"))
    assert spec is not None
    return spec.grammar

"""The model's own chat template: found, compiled in a sandbox, and rendered.

Lookup order (reference 3.10): `chat_template.jinja`, `chat_template.json`, `tokenizer_config.json` (a string, or a
list of named templates). `NEURON_USE_CHAT_TEMPLATE=0` switches templates off; then, and where there is none, plain
ChatML is written. Templates get Jinja as `transformers` gives it to them: trimmed blocks, loop controls,
`raise_exception`, `strftime_now`, a `tojson` that does not escape HTML, and Python's own string methods.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from neuron.checkpoint.errors import NotJson
from neuron.checkpoint.files import read_json, read_text
from neuron.daemon.prompt.messages import Message

logger = logging.getLogger(__name__)

_SWITCHED_OFF = frozenset({"false", "0", "no", "off"})
_SHOWN_CHARACTERS = 300
_RESERVED = frozenset({"messages", "tools", "documents"})


class TemplateRenderError(Exception):
    """The template refused the conversation or failed on it; the message is the template's own where it has one."""


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks training targets; when serving, its body is just rendered."""

    tags = {"generation"}  # noqa: RUF012 - the name and form that jinja2 reads

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().astimezone().strftime(pattern)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationBlock]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """Compiled templates of one model. `render` is thread-safe.

    source: the default template's text, "" without one. has_template: False when plain ChatML is written.
    renders_tools: the template shows tools to the model. keeps_inner_system: it renders a system message after the
    first turn rather than dropping it. uses_xml_calls: it teaches the `<function=…>` form of tool calls.
    """

    def __init__(self, templates: dict[str, str], special_tokens: dict[str, str]) -> None:
        environment = _environment()
        self._special_tokens = special_tokens
        self._templates: dict[str, jinja2.Template] = {}
        for name, source in templates.items():
            try:
                self._templates[name] = environment.from_string(source)
            except MemoryError:
                raise
            except Exception as exc:  # also what Python says to what Jinja makes of it, and of nesting without end
                logger.warning("chat template %r does not compile and is ignored: %s", name, _shown(exc))
        self._default = next(
            (name for name in ("default", "tool_use", *self._templates) if name in self._templates), None
        )
        self.source = templates[self._default] if self._default is not None else ""
        self.all_sources = "".join(templates[name] for name in self._templates)
        self.uses_xml_calls = "<function=" in self.all_sources
        self.renders_tools = self._probe_tools()
        self.keeps_inner_system = self._probe_inner_system()

    @classmethod
    def load(cls, path: Path, special_tokens: dict[str, str]) -> ChatTemplate:
        """The template of a checkpoint folder; a folder without one gives plain ChatML."""
        if os.environ.get("NEURON_USE_CHAT_TEMPLATE", "").strip().lower() in _SWITCHED_OFF:
            return cls({}, special_tokens)
        return cls(find_templates(path), special_tokens)

    @property
    def has_template(self) -> bool:
        return self._default is not None

    def render(
        self,
        messages: list[Message],
        *,
        tools: list[Message] | None = None,
        add_generation_prompt: bool = True,
        variables: dict[str, Any] | None = None,
    ) -> str:
        """The conversation as one text. Raises `TemplateRenderError`.

        variables: the client's `chat_template_kwargs`; they override everything but the conversation itself.
        """
        name = "tool_use" if tools and "tool_use" in self._templates else self._default
        if name is None:
            return chatml(messages, add_generation_prompt=add_generation_prompt)
        context: dict[str, Any] = {
            **self._special_tokens,
            "add_generation_prompt": add_generation_prompt,
            **{key: value for key, value in (variables or {}).items() if key not in _RESERVED},
            "messages": messages,
            "tools": tools or None,
            "documents": None,
        }
        try:
            return self._templates[name].render(context)
        except jinja2.TemplateError as exc:
            raise TemplateRenderError(_shown(exc)) from exc
        except MemoryError:  # of this process and not of one template: who gave it its limit decides
            raise
        except Exception as exc:  # a template is a program; what it does wrong is its error, not ours
            raise TemplateRenderError(f"{type(exc).__name__}: {_shown(exc)}") from exc

    def _shows(self, marker: str, render: Callable[[], str]) -> bool:
        try:
            return marker in render()
        except TemplateRenderError:
            return False

    def _probe_tools(self) -> bool:
        if not self.has_template:
            return False
        parameters = {"type": "object", "properties": {"value": {"type": "string", "description": "a value"}}}
        function = {"name": "probe_tool_name", "description": "probe", "parameters": parameters}
        tools: list[Message] = [{"type": "function", "function": function}]
        messages: list[Message] = [{"role": "user", "content": "probe"}]
        return self._shows("probe_tool_name", lambda: self.render(messages, tools=tools))

    def _probe_inner_system(self) -> bool:
        messages: list[Message] = [
            {"role": "user", "content": "first"},
            {"role": "assistant", "content": "second"},
            {"role": "user", "content": "third"},
            {"role": "system", "content": "probe_system_content"},
        ]
        return self._shows("probe_system_content", lambda: self.render(messages))


def _shown(exc: Exception) -> str:
    """What a template says may quote all of a conversation."""
    text = str(exc) or type(exc).__name__
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"


def chatml(messages: list[Message], *, add_generation_prompt: bool = True) -> str:
    """Plain ChatML, for models without a template. Calls and results of the past are written in the Qwen form."""
    lines = []
    for message in messages:
        content = str(message.get("content") or "")
        pieces = [content] if content else []
        for call in message.get("tool_calls", ()):
            function = call["function"]
            arguments = function["arguments"]
            text = arguments if isinstance(arguments, str) else _to_json(arguments)
            pieces.append(f'<tool_call>\n{{"name": {_to_json(function["name"])}, "arguments": {text}}}\n</tool_call>')
        lines.append(f"<|im_start|>{message['role']}\n{chr(10).join(pieces)}<|im_end|>\n")
    if add_generation_prompt:
        lines.append("<|im_start|>assistant\n")
    return "".join(lines)


# ---------------------------------------------------------------- finding the template


def find_templates(path: Path) -> dict[str, str]:
    """Named templates of a checkpoint folder, `default` first where there is one; empty if it has none."""
    try:
        return {"default": read_text(path / "chat_template.jinja")}
    except FileNotFoundError:
        pass
    for name in ("chat_template.json", "tokenizer_config.json"):
        templates = _templates_in(path / name)
        if templates:
            return templates
    return {}


def _templates_in(file: Path) -> dict[str, str]:
    try:
        document = read_json(file)
    except FileNotFoundError:
        return {}
    except NotJson as exc:
        logger.warning("%s is ignored: %s", file, exc)
        return {}
    value = document.get("chat_template") if isinstance(document, dict) else document
    if isinstance(value, str):
        return {"default": value}
    templates: dict[str, str] = {}
    for index, entry in enumerate(value if isinstance(value, list) else ()):
        if isinstance(entry, dict) and isinstance(entry.get("template"), str):
            templates.setdefault(str(entry.get("name") or f"template_{index}"), entry["template"])
    if isinstance(value, dict):
        templates |= {str(name): source for name, source in value.items() if isinstance(source, str)}
    return templates

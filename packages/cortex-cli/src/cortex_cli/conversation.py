"""A chat with one model through the gateway: what `cortex chat` and `cortex demo` share."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import click

from cortex_cli.exits import CliError
from cortex_cli.gateway import Gateway


class Conversation:
    """Turns so far, and how to ask for the next one. `think` None leaves reasoning to the model's template."""

    def __init__(
        self,
        gateway: Gateway,
        model: str,
        *,
        system: str | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        think: bool | None = None,
    ) -> None:
        self._gateway = gateway
        self._settings: dict[str, Any] = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
        if max_tokens is not None:
            self._settings["max_completion_tokens"] = max_tokens
        if temperature is not None:
            self._settings["temperature"] = temperature
        if think is not None:
            self._settings["chat_template_kwargs"] = {"enable_thinking": think}
        self._turns: list[dict[str, str]] = []
        if system:
            self._turns.append({"role": "system", "content": system})

    def ask(self, question: str, *, on_text: Callable[[str], None], on_reasoning: Callable[[str], None]) -> str:
        """Send `question`, call back for each piece as it arrives, return a one-line timing summary."""
        self._turns.append({"role": "user", "content": question})
        started = time.monotonic()
        first: float | None = None
        answer: list[str] = []
        usage: dict[str, Any] = {}
        for _, data in self._gateway.stream("/v1/chat/completions", {**self._settings, "messages": self._turns}):
            if data == "[DONE]":
                break
            chunk = json.loads(data)
            if "error" in chunk:
                raise CliError(chunk["error"]["message"])
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                delta = choice["delta"]
                if delta.get("reasoning_content") or delta.get("content"):
                    first = first or time.monotonic()
                if delta.get("reasoning_content"):
                    on_reasoning(delta["reasoning_content"])
                if delta.get("content"):
                    answer.append(delta["content"])
                    on_text(delta["content"])
        else:
            raise CliError("the answer broke off before its end")
        self._turns.append({"role": "assistant", "content": "".join(answer)})
        return _timing(started, first, time.monotonic(), usage.get("completion_tokens", 0))


def _timing(started: float, first: float | None, ended: float, tokens: int) -> str:
    if first is None:
        return f"no text, {tokens} tokens, {ended - started:.2f} s"
    rate = f", {(tokens - 1) / (ended - first):.1f} tok/s" if tokens > 1 and ended > first else ""
    return f"first token {first - started:.2f} s, {tokens} tokens{rate}"


def run_chat(conversation: Conversation, *, farewell: str = "") -> None:
    """Read questions from the terminal until end of file or `/bye`."""
    click.echo("Ask something; /bye or Ctrl-D ends the chat.", err=True)
    while True:
        try:
            question = input(">>> ").strip()
        except EOFError:
            click.echo(farewell, err=True)
            return
        if question in ("/bye", "/exit", "/quit"):
            return
        if question:
            ask_once(conversation, question)


def ask_once(conversation: Conversation, question: str) -> None:
    """Print the answer on stdout as it comes, reasoning and timing on stderr."""
    thinking = False

    def on_reasoning(text: str) -> None:
        nonlocal thinking
        thinking = True
        click.secho(text, nl=False, err=True, dim=True)

    def on_text(text: str) -> None:
        nonlocal thinking
        if thinking:
            click.echo(err=True)
            thinking = False
        click.echo(text, nl=False)

    summary = conversation.ask(question, on_text=on_text, on_reasoning=on_reasoning)
    click.echo()
    click.secho(f"[{summary}]", err=True, dim=True)

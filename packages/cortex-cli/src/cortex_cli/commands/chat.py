"""`cortex chat`: talk to a model through the gateway."""

from __future__ import annotations

import sys

import click

from cortex_cli.conversation import Conversation, ask_once, run_chat
from cortex_cli.exits import EXIT_NOT_FOUND, CliError
from cortex_cli.gateway import Gateway
from cortex_cli.options import endpoint_option


@click.command(
    help="Chat with MODEL (default: the first one that is loaded). With PROMPT words, answer once and exit; `-` reads "
    "the prompt from stdin."
)
@click.argument("model", required=False)
@click.argument("prompt", nargs=-1)
@click.option("--system", help="System prompt.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Upper bound on generated tokens.")
@click.option("--temperature", type=click.FloatRange(0, 2), help="Sampling temperature; 0 is greedy.")
@click.option("--think/--no-think", default=None, help="Ask for reasoning, or for none.")
@endpoint_option
def chat(
    model: str | None,
    prompt: tuple[str, ...],
    system: str | None,
    max_tokens: int | None,
    temperature: float | None,
    think: bool | None,
    endpoint: str,
) -> None:
    gateway = Gateway(endpoint)
    conversation = Conversation(
        gateway,
        model or first_model(gateway),
        system=system,
        max_tokens=max_tokens,
        temperature=temperature,
        think=think,
    )
    text = sys.stdin.read() if prompt == ("-",) else " ".join(prompt)
    if text.strip():
        ask_once(conversation, text)
    else:
        run_chat(conversation)


def first_model(gateway: Gateway) -> str:
    entries = gateway.get("/v1/models")["data"]
    loaded = [entry["id"] for entry in entries if entry.get("loaded")]
    if loaded:
        return str(loaded[0])
    if entries:
        return str(entries[0]["id"])
    raise CliError("the gateway knows no model; load one with `cortex load`", EXIT_NOT_FOUND)

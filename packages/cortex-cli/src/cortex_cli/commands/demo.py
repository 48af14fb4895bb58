"""`cortex demo`: a neuron, a gateway and a model that answers, in one command."""

from __future__ import annotations

import signal
import sys
from typing import Any

import click

from cortex_cli.conversation import Conversation, ask_once, run_chat
from cortex_cli.demo_fleet import DemoFleet
from cortex_cli.exits import EXIT_INTERRUPTED
from cortex_cli.gateway import Gateway

_PORT = click.IntRange(0, 65535)


@click.command(
    help="Start a neuron with a model and a gateway on loopback, show how to call them, and chat. The default model "
    "is our own small demo model; --model org/name or --model file:PATH serves a real checkpoint."
)
@click.option("--model", default="cortex/demo", show_default=True, help="What to serve.")
@click.option("--once", metavar="QUESTION", help="Print the answer to one question and exit.")
@click.option("--no-chat", is_flag=True, help="Serve until interrupted.")
@click.option("--think/--no-think", default=None, help="Let the model reason first, or not.")
@click.option("--gateway-port", type=_PORT, default=0, help="Fixed port of the gateway (default: a free one).")
@click.option("--neuron-port", type=_PORT, default=0, help="Fixed port of the neuron (default: a free one).")
@click.option(
    "--metrics-port", type=_PORT, default=0, help="Fixed port of the gateway's metrics (default: a free one)."
)
def demo(
    model: str,
    once: str | None,
    no_chat: bool,
    think: bool | None,
    gateway_port: int,
    neuron_port: int,
    metrics_port: int,
) -> None:
    # SIGTERM must unwind the stack like Ctrl-C does: the children are stopped on the way out.
    signal.signal(signal.SIGTERM, _interrupt)
    fleet = DemoFleet(model=model, gateway_port=gateway_port, neuron_port=neuron_port, metrics_port=metrics_port)
    with fleet:
        _start(fleet, quiet=once is not None)
        if once is not None:
            ask_once(Conversation(Gateway(fleet.gateway_url), fleet.model, think=think), once)
            return
        click.echo(usage_text(fleet.gateway_url, fleet.metrics_url, fleet.model))
        if no_chat or not sys.stdin.isatty():
            try:
                fleet.wait()
            except KeyboardInterrupt:
                return
        else:
            run_chat(Conversation(Gateway(fleet.gateway_url), fleet.model, think=think))


def _start(fleet: DemoFleet, *, quiet: bool) -> None:
    if quiet or not sys.stderr.isatty():
        fleet.start()
        return
    from rich.console import Console

    with Console(stderr=True).status("starting a neuron and a gateway") as status:
        fleet.start(on_progress=status.update)


def _interrupt(signum: int, frame: Any) -> None:
    raise click.exceptions.Exit(EXIT_INTERRUPTED) if signum == signal.SIGINT else KeyboardInterrupt


def usage_text(url: str, metrics_url: str, model: str) -> str:
    """Ready-to-paste calls in both dialects."""
    return f"""\
cortex is listening on {url} and serves {model}

OpenAI dialect:
  curl {url}/v1/chat/completions -H 'content-type: application/json' \\
    -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "What is 12+30?"}}]}}'

  from openai import OpenAI
  client = OpenAI(base_url="{url}/v1", api_key="none")
  print(client.chat.completions.create(model="{model}",
        messages=[{{"role": "user", "content": "What is 12+30?"}}]).choices[0].message.content)

Anthropic dialect:
  curl {url}/v1/messages -H 'content-type: application/json' -H 'anthropic-version: 2023-06-01' \\
    -d '{{"model": "{model}", "max_tokens": 100, "messages": [{{"role": "user", "content": "What is 12+30?"}}]}}'

  from anthropic import Anthropic
  client = Anthropic(base_url="{url}", api_key="none")
  print(client.messages.create(model="{model}", max_tokens=100,
        messages=[{{"role": "user", "content": "What is 12+30?"}}]).content[0].text)

Command line:
  cortex chat --endpoint {url} {model}
  cortex status --endpoint {url}

Metrics: {metrics_url}/metrics
"""

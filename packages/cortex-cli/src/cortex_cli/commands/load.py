"""`cortex load` and `cortex unload`."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from cortex_cli.exits import CliError
from cortex_cli.gateway import Gateway
from cortex_cli.options import endpoint_option, json_option


@click.command(help="Load MODEL on the best node (or on --node), showing progress. The load outlives this command.")
@click.argument("model")
@click.option("--node", help="Name of the node; the gateway chooses when it is left out.")
@endpoint_option
@json_option
def load(model: str, node: str | None, endpoint: str, as_json: bool) -> None:
    gateway = Gateway(endpoint, timeout_s=3600)
    body: dict[str, Any] = {"model": model}
    if node:
        body["node"] = node
    if as_json or not sys.stderr.isatty():
        answer = gateway.post("/admin/models/load", body)
        click.echo(json.dumps(answer) if as_json else _sentence("loaded", answer))
        return
    click.echo(_sentence("loaded", _load_with_progress(gateway, body)))


def _load_with_progress(gateway: Gateway, body: dict[str, Any]) -> dict[str, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bars: dict[str, Any] = {}
        for name, data in gateway.stream("/admin/models/load", body):
            payload = json.loads(data)
            if name == "progress":
                phase = payload["phase"]
                if phase not in bars:
                    bars[phase] = progress.add_task(phase, total=None)
                progress.update(bars[phase], completed=payload["bytes_done"], total=payload["bytes_total"] or None)
            elif name == "waiting":
                progress.console.print(f"waits for {payload['text']}", markup=False, highlight=False)
            elif name == "error":
                raise CliError(payload["error"]["message"])
            elif name == "done":
                return dict(payload)
    raise CliError("the gateway ended the progress stream without a result; see `cortex models`")


@click.command(help="Unload MODEL from --node, or from every node that has it.")
@click.argument("model")
@click.option("--node", help="Name of the node.")
@endpoint_option
@json_option
def unload(model: str, node: str | None, endpoint: str, as_json: bool) -> None:
    body = {"model": model, **({"node": node} if node else {})}
    answer = Gateway(endpoint, timeout_s=300).post("/admin/models/unload", body)
    click.echo(json.dumps(answer) if as_json else _sentence("unloaded", answer))


def _sentence(verb: str, answer: dict[str, Any]) -> str:
    nodes = answer.get("nodes") or [answer["node"]]
    return f"{answer['model']} {verb} on {', '.join(nodes)}"

"""`cortex pin` and `cortex unpin`."""

from __future__ import annotations

import json

import click

from cortex_cli.gateway import Gateway
from cortex_cli.options import endpoint_option, json_option


@click.command(help="Keep MODEL where it is loaded (or on --node): nothing displaces it, no idle time unloads it.")
@click.argument("model")
@click.option("--node", help="Name of the node.")
@endpoint_option
@json_option
def pin(model: str, node: str | None, endpoint: str, as_json: bool) -> None:
    _post("pin", model, node, endpoint, as_json=as_json)


@click.command(help="Let MODEL make room again, on --node or wherever it is pinned.")
@click.argument("model")
@click.option("--node", help="Name of the node.")
@endpoint_option
@json_option
def unpin(model: str, node: str | None, endpoint: str, as_json: bool) -> None:
    _post("unpin", model, node, endpoint, as_json=as_json)


def _post(verb: str, model: str, node: str | None, endpoint: str, *, as_json: bool) -> None:
    body = {"model": model, **({"node": node} if node else {})}
    answer = Gateway(endpoint, timeout_s=60).post(f"/admin/models/{verb}", body)
    if as_json:
        click.echo(json.dumps(answer))
        return
    click.echo(f"{answer['model']} {answer['status']} on {', '.join(answer['nodes'])}")
    kept_here = [name for name, keeper in answer["kept_by"].items() if keeper == "gateway"]
    if kept_here:
        click.echo(
            f"{', '.join(kept_here)}: the neuron is too old for pins; only this gateway keeps it, until it restarts.",
            err=True,
        )

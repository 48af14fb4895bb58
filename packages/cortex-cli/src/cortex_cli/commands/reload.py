"""`cortex reload`: the gateway reads its configuration again."""

from __future__ import annotations

import json

import click

from cortex_cli.gateway import Gateway
from cortex_cli.options import endpoint_option, json_option


@click.command(
    help="Make a running gateway read cortex.toml and the catalogue again, and say what changed. If anything is wrong "
    "with them, all of it is refused, every fault is named, and the exit code is 1."
)
@endpoint_option
@json_option
def reload(endpoint: str, as_json: bool) -> None:
    answer = Gateway(endpoint, timeout_s=60).post("/admin/reload", {})
    click.echo(json.dumps(answer) if as_json else f"{answer['outcome']}: {answer['summary']}")

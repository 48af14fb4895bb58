"""`cortex status`: health of the fleet and where each model is."""

from __future__ import annotations

import json

import click

from cortex_cli.gateway import Gateway
from cortex_cli.options import endpoint_option, json_option


@click.command(help="Health of the fleet, and where each model is.")
@endpoint_option
@json_option
def status(endpoint: str, as_json: bool) -> None:
    gateway = Gateway(endpoint, timeout_s=30)
    health = gateway.get("/health")
    models = gateway.get("/v1/models")["data"]
    if as_json:
        click.echo(json.dumps({"health": health, "models": models}))
        return
    click.echo(f"Fleet health: {json.dumps(health, indent=2)}\n\nModels:")
    for model in models:
        places = ", ".join(f"{place['node']}({place['status']})" for place in model.get("locations", ()))
        click.echo(f"  {model['id']:<40} {places}".rstrip())

"""`cortex version`: versions of the installed packages."""

from __future__ import annotations

import json
import platform
from importlib import metadata

import click

from cortex_cli.options import json_option

_PACKAGES = (
    "helexa-cortex-cli",
    "helexa-cortex-gateway",
    "helexa-cortex-core",
    "helexa-neuron",
    "torch",
)


@click.command(help="Versions of cortex and of what it runs on.")
@json_option
def version(as_json: bool) -> None:
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    versions["python"] = platform.python_version()
    if as_json:
        click.echo(json.dumps(versions))
        return
    for name, text in versions.items():
        click.echo(f"{name:<24} {text or 'not installed'}")

"""`cortex config check`: would these files be accepted? `cortex config schema`: what would be?"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cortex_cli.exits import EXIT_FAILED, CliError
from cortex_cli.options import json_option

if TYPE_CHECKING:
    from cortex_core.gateway_config import GatewayConfig


@click.group(help="Work with configuration files.")
def config() -> None:
    pass


@config.command(
    help="Check configuration FILES (cortex.toml, models.toml, neuron.toml) and name every fault with file, line "
    "and key. Without FILES: cortex.toml and the catalogue it names. Exit code 1 if anything is wrong. Secrets are "
    "read only with --secrets: often this shell may not see what the gateway's user and environment see."
)
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--kind",
    type=click.Choice(["cortex", "models", "neuron"]),
    help="What the files are, when their names do not say it.",
)
@click.option("--secrets", is_flag=True, help="Read the secrets that the files refer to as well, as a start does.")
@json_option
def check(files: tuple[Path, ...], kind: str | None, secrets: bool, as_json: bool) -> None:
    faults: list[str] = []
    checked: list[str] = []
    for path in files or (Path("cortex.toml"),):
        _check_file(path, kind or _kind_of(path), secrets, checked, faults)
    if as_json:
        click.echo(json.dumps({"ok": not faults, "checked": checked, "faults": faults}))
    else:
        for line in faults:
            click.echo(line, err=True)
        if not faults:
            click.echo(f"ok: {', '.join(checked)}")
    if faults:
        raise click.exceptions.Exit(EXIT_FAILED)


def _kind_of(path: Path) -> str:
    for kind in ("models", "neuron"):
        if kind in path.name:
            return kind
    return "cortex"


def _check_file(path: Path, kind: str, secrets: bool, checked: list[str], faults: list[str]) -> None:
    from cortex_core.catalogue import load_catalogue
    from cortex_core.config import ConfigError
    from cortex_core.fleet_secret import resolve_secrets
    from cortex_core.gateway_config import load_gateway_config

    checked.append(str(path))
    try:
        if kind == "cortex":
            loaded = load_gateway_config(path)
            models = Path(loaded.models_config)
            if models.exists():
                _check_file(models, "models", secrets, checked, faults)
            if secrets:
                _check_secrets(path, loaded, faults)
        elif kind == "models":
            if not path.exists():
                raise ConfigError([f"{path}: no such file"])
            load_catalogue(path)
        else:
            try:
                from neuron.daemon.common.config import load_neuron_config
            except ImportError:
                raise ConfigError([f"{path}: helexa-neuron is not installed here, so it cannot be checked"]) from None
            neuron = load_neuron_config(path)
            if secrets:
                resolve_secrets(neuron.server.secret, os.environ, where=f"{path}: server.secret")
    except ConfigError as exc:
        faults.extend(exc.faults)


def _check_secrets(path: Path, loaded: GatewayConfig, faults: list[str]) -> None:
    from cortex_core.catalogue import Catalogue
    from cortex_core.config import ConfigError
    from cortex_gateway.configuration.current import with_secrets

    try:
        with_secrets(loaded, Catalogue())
    except ConfigError as exc:
        faults.extend(f"{path}: {fault}" for fault in exc.faults)


@config.command(
    help="Print the JSON Schema of cortex.toml, models.toml or neuron.toml, made from the types that `config check` "
    "and the daemons read them with. For editors: put `#:schema FILE` into the first line of the TOML."
)
@click.argument("kind", type=click.Choice(["cortex", "models", "neuron"]), default="cortex")
def schema(kind: str) -> None:
    import msgspec

    described = msgspec.json.schema(_type_of(kind))
    named = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"{kind}.toml",
        **described,
    }
    click.echo(json.dumps(named, indent=2, sort_keys=True))


def _type_of(kind: str) -> type:
    if kind == "cortex":
        from cortex_core.gateway_config import GatewayConfig

        return GatewayConfig
    if kind == "models":
        from cortex_core.catalogue import Catalogue

        return Catalogue
    try:
        from neuron.daemon.common.config import NeuronConfig
    except ImportError:
        raise CliError("helexa-neuron is not installed here, so its schema is not known") from None
    return NeuronConfig

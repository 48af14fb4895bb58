"""`cortex serve`: run the gateway."""

from __future__ import annotations

from pathlib import Path

import click

from cortex_cli.exits import CliError


@click.command(help="Run the gateway.")
@click.option(
    "-c",
    "--config",
    "config_path",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("cortex.toml"),
    show_default=True,
    envvar="CORTEX_CONFIG",
    help="Configuration file.",
)
def serve(config_path: Path) -> None:
    from cortex_core.config import ConfigError
    from cortex_core.gateway_config import load_gateway_config
    from cortex_gateway.server import serve as serve_gateway

    try:
        config = load_gateway_config(config_path)
    except ConfigError as exc:
        raise CliError(f"configuration refused\n{exc}") from exc
    raise click.exceptions.Exit(serve_gateway(config, config_path=config_path))

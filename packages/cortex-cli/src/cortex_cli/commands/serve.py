"""`cortex serve`: run the gateway."""

from __future__ import annotations

from pathlib import Path

import click

from cortex_cli.exits import CliError
from cortex_cli.options import config_option


@click.command(help="Run the gateway.")
@config_option
def serve(config_path: Path) -> None:
    from cortex_core.config import ConfigError
    from cortex_core.gateway_config import load_gateway_config
    from cortex_core.serving.keeping import OWNS_PROCESS, keep

    try:
        config = load_gateway_config(config_path)
    except ConfigError as exc:
        raise CliError(f"configuration refused\n{exc}") from exc
    if click.get_current_context().find_object(object) is OWNS_PROCESS:
        keep("cortex", config.gateway.watchdog_s, stream=1)
    from cortex_gateway.server import serve as serve_gateway

    raise click.exceptions.Exit(serve_gateway(config, config_path=config_path))

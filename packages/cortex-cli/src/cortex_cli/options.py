"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_ENDPOINT = "http://localhost:31313"


def endpoint_option(function: F) -> F:
    return click.option(
        "-e",
        "--endpoint",
        envvar="CORTEX_ENDPOINT",
        default=DEFAULT_ENDPOINT,
        show_default=True,
        show_envvar=True,
        help="URL of the gateway.",
    )(function)


def json_option(function: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout and nothing else.")(
        function
    )


def config_option(function: F) -> F:
    return click.option(
        "-c",
        "--config",
        "config_path",
        type=click.Path(path_type=Path, dir_okay=False),
        default=Path("cortex.toml"),
        show_default=True,
        envvar="CORTEX_CONFIG",
        help="Configuration file of the gateway.",
    )(function)

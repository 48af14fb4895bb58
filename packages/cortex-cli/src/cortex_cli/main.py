"""The `cortex` command: the root group, its exit codes and the one place where errors become exit codes."""

from __future__ import annotations

import importlib
import sys
from importlib import metadata

import click

from cortex_cli.exits import EXIT_INTERRUPTED, CliError

_COMMANDS = {
    "bench": "cortex_cli.commands.bench:bench",
    "captures": "cortex_cli.commands.captures:captures",
    "chat": "cortex_cli.commands.chat:chat",
    "config": "cortex_cli.commands.config:config",
    "demo": "cortex_cli.commands.demo:demo",
    "keys": "cortex_cli.commands.keys:keys",
    "load": "cortex_cli.commands.load:load",
    "logs": "cortex_cli.commands.logs:logs",
    "models": "cortex_cli.commands.models:models",
    "pin": "cortex_cli.commands.pin:pin",
    "reload": "cortex_cli.commands.reload:reload",
    "serve": "cortex_cli.commands.serve:serve",
    "status": "cortex_cli.commands.status:status",
    "top": "cortex_cli.commands.top:top",
    "unload": "cortex_cli.commands.load:unload",
    "unpin": "cortex_cli.commands.pin:unpin",
    "version": "cortex_cli.commands.version:version",
}


class LazyGroup(click.Group):
    """A group that imports a command's module only when that command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        target = _COMMANDS.get(cmd_name)
        if target is None:
            return None
        module, _, attribute = target.partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Unified inference gateway for multi-node GPU clusters.",
    epilog="Exit codes: 0 ok, 1 failed, 2 usage, 3 gateway out of reach, 4 not found, 130 interrupted.",
)
@click.version_option(metadata.version("helexa-cortex-cli"), prog_name="cortex")
def cli() -> None:
    pass


def main() -> None:
    """Run the command line and exit with the documented code."""
    from cortex_core.serving.keeping import OWNS_PROCESS

    try:
        # click hands an `Exit` back as the return value when it does not end the process itself.
        code = cli.main(prog_name="cortex", standalone_mode=False, obj=OWNS_PROCESS)
    except CliError as exc:
        click.echo(f"cortex: {exc}", err=True)
        sys.exit(exc.exit_code)
    except click.exceptions.Abort:
        sys.exit(EXIT_INTERRUPTED)
    except click.ClickException as exc:
        exc.show()
        sys.exit(exc.exit_code)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has left (`cortex models | head`): not an error, and nothing more to say.
        sys.stderr.close()
        sys.exit(0)
    sys.exit(code if isinstance(code, int) else 0)

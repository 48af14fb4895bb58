"""The `neuron` command."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import click
import msgspec
from cortex_core.config import ConfigError
from cortex_core.fleet import DiscoveryResponse, ModelSpec

DEFAULT_CONFIG = Path("neuron.toml")
_LEVELS = {"trace": "DEBUG", "warn": "WARNING"}


class NeuronGroup(click.Group):
    """`neuron --config …` without a command is `neuron serve --config …`, as in the reference."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] not in ("--help", "-h", "--version")):
            args = ["serve", *args]
        return super().parse_args(ctx, args)


def _show_version(ctx: click.Context, _: click.Parameter, is_asked: bool) -> None:
    if is_asked and not ctx.resilient_parsing:
        from neuron.build_info import read_build_info, version_line

        click.echo(version_line(read_build_info()))
        ctx.exit()


@click.group(
    cls=NeuronGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Serve open-weight models on this host. Without a command: serve.",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show what this build is.",
)
def cli() -> None:
    pass


@cli.command(help="Serve models over HTTP until SIGTERM or SIGINT; a second signal does not wait for streams.")
@click.option(
    "-c",
    "--config",
    "config_path",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    envvar="NEURON_CONFIG",
    help=f"Configuration file (default: {DEFAULT_CONFIG}, if there is one).",
)
@click.option("-p", "--port", type=click.IntRange(0, 65535), help="Port to listen on; 0 takes a free one.")
@click.option("--host", help="Address to listen on.")
@click.option("--model", "models", multiple=True, metavar="ID", help="Load this model at start. Repeatable.")
@click.option("--debug-levers", is_flag=True, help="Let loads ask for engines that fail in a chosen way. For tests.")
def serve(
    config_path: Path | None, port: int | None, host: str | None, models: tuple[str, ...], debug_levers: bool
) -> None:
    from cortex_core.serving.keeping import OWNS_PROCESS, keep

    from neuron.daemon.common.config import load_neuron_config

    try:
        config = load_neuron_config(config_path or DEFAULT_CONFIG, required=config_path is not None)
    except ConfigError as exc:
        raise click.ClickException(f"configuration refused\n{exc}") from exc
    if click.get_current_context().find_object(object) is OWNS_PROCESS:
        keep("neuron", config.server.watchdog_s, stream=2)
    from neuron.daemon.server import serve as serve_daemon

    _set_up_logging()
    changes: dict[str, object] = {}
    if port is not None:
        changes["port"] = port
    if host is not None:
        changes["host"] = host
    if debug_levers:
        changes["debug_levers"] = True
    if models:
        changes["default_models"] = (*config.default_models, *(ModelSpec(model_id=model) for model in models))
    raise click.exceptions.Exit(serve_daemon(msgspec.structs.replace(config, **changes), on_ready=_say_ready))


@cli.command(help="Show what this host offers: devices, driver, cores and memory.")
@click.option("--json", "as_json", is_flag=True, help="As JSON, exactly what GET /discovery answers.")
def discover(as_json: bool) -> None:
    from neuron.daemon.common.config import HARNESS
    from neuron.daemon.hardware.monitor import HardwareMonitor

    logging.basicConfig(level=logging.ERROR, stream=sys.stderr, format="%(message)s")
    found = HardwareMonitor(harnesses=(HARNESS,)).discovery
    if as_json:
        click.echo(msgspec.json.encode(found).decode())
    else:
        click.echo(_describe(found))


@cli.command(
    "tp-smoke",
    help="Try tensor parallelism: real rank processes on a tiny random model, compared with one rank. Exit code 1 if "
    "anything is wrong.",
)
@click.option("--devices", metavar="LIST", help="CUDA indexes, one for each rank: 0,1")
@click.option("--cpu", is_flag=True, help="On the CPU, with --ranks processes.")
@click.option("--ranks", type=click.IntRange(2, 64), help="Number of ranks on the CPU (default 2).")
@click.option(
    "--timeout", "timeout_s", type=click.FloatRange(min=1), default=180.0, help="Seconds for each of the two groups."
)
@click.option("--json", "as_json", is_flag=True, help="As one JSON document.")
def tp_smoke(devices: str | None, cpu: bool, ranks: int | None, timeout_s: float, as_json: bool) -> None:
    import asyncio

    from neuron.daemon.supervisor.tp_smoke import run_smoke

    if cpu == (devices is not None) or (ranks is not None and not cpu):
        raise click.UsageError("Give either --devices, or --cpu with --ranks.")
    indexes = _device_list(devices) if devices is not None else ()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    report = asyncio.run(run_smoke(world_size=len(indexes) or ranks or 2, devices=indexes, timeout_s=timeout_s))
    if as_json:
        click.echo(msgspec.json.encode(report).decode())
    else:
        for rank in report.ranks:
            click.echo(f"rank {rank.rank}  pid {rank.pid}  {rank.device}  {', '.join(rank.checks) or 'nothing'}")
        if report.ok:
            click.echo(f"greedy answers equal those of one rank ({sum(map(len, report.answers))} tokens)")
            click.echo(f"loaded in {report.load_seconds:.1f} s, {report.step_ms:.1f} ms a step")
        placed = ",".join(map(str, report.devices)) or "cpu"
        click.echo(f"status={'ok' if report.ok else 'failed'} tp_size={report.tp_size} devices={placed}")
    if report.problem is not None:
        click.echo(f"error: {report.problem}", err=True)
    raise click.exceptions.Exit(0 if report.ok else 1)


def _device_list(text: str) -> tuple[int, ...]:
    try:
        indexes = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"`{text}` is no list of device indexes", param_hint="--devices") from None
    if len(indexes) < 2 or len(set(indexes)) != len(indexes) or min(indexes) < 0:
        raise click.BadParameter("tensor parallelism needs at least two different devices", param_hint="--devices")
    return indexes


def _describe(found: DiscoveryResponse) -> str:
    lines = [
        f"host      {found.hostname} ({found.os} {found.kernel})",
        f"cpu       {found.cpu_count} cores, {found.memory_total_mb} MiB memory",
        f"driver    {found.driver_version or 'none'}, CUDA {found.cuda_version or 'none'}",
    ]
    lines += [
        f"device {device.index}  {device.name}, {device.vram_total_mb} MiB, compute {device.compute_capability}"
        for device in found.devices
    ]
    if not found.devices:
        lines.append(f"devices   none{f': {found.cuda_unavailable_reason}' if found.cuda_unavailable_reason else ''}")
    return "\n".join(lines)


def _say_ready(url: str) -> None:
    """The one line on stdout: whoever started us with port 0 reads the real one here. Logs go to stderr."""
    click.echo(f"neuron listening on {url}")
    sys.stdout.flush()


def _set_up_logging() -> None:
    """To stderr; the level from `NEURON_LOG` or the reference's `RUST_LOG` (its first word), `info` by default."""
    from cortex_core.serving.later import later
    from cortex_core.serving.log_lines import LineFormatter, LineLimit

    wanted = (os.environ.get("NEURON_LOG") or os.environ.get("RUST_LOG") or "info").split(",")[0].split("=")[-1]
    level = _LEVELS.get(wanted.lower(), wanted.upper())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    # A request's line has a rule of its own, and what an engine says is no client's doing: its stacks are many lines.
    handler.addFilter(LineLimit(exempt=("neuron.request", "neuron.engine"), later=later))
    logging.basicConfig(level=level if level in logging.getLevelNamesMapping() else "INFO", handlers=[handler])
    for name in ("httpx", "httpx2", "httpcore", "filelock", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.WARNING)


def main() -> None:
    """Entry point of the `neuron` command."""
    from cortex_core.serving.keeping import OWNS_PROCESS

    cli.main(prog_name="neuron", obj=OWNS_PROCESS)

"""`cortex bench`: how fast an OpenAI-compatible endpoint answers under load."""

from __future__ import annotations

import asyncio
import os

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cortex_cli.exits import EXIT_FAILED
from cortex_cli.options import endpoint_option, json_option


@click.command(
    help="Send streamed chat requests to MODEL at an OpenAI-compatible endpoint (ours or anybody's) and print time to "
    "first token, inter-token latency, latency and throughput. Exit code 1 if any request failed.",
    epilog="The key of an endpoint that wants one is read from OPENAI_API_KEY.",
)
@click.argument("model")
@endpoint_option
@click.option("-n", "--requests", type=click.IntRange(min=1), default=100, show_default=True, help="Requests in all.")
@click.option(
    "-c",
    "--concurrency",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Requests at a time, at most.",
)
@click.option(
    "--rate", type=click.FloatRange(min=0, min_open=True), help="Requests per second, at random times (Poisson)."
)
@click.option(
    "--prompt-words", type=click.IntRange(min=1), default=200, show_default=True, help="Length of a prompt, in words."
)
@click.option(
    "--shared-words",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Words that all prompts begin with.",
)
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Longest answer, in tokens."
)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True)
@click.option("--ignore-eos", is_flag=True, help="Answers of full length, where the server supports it.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the prompts and their times.")
@json_option
def bench(
    model: str,
    endpoint: str,
    requests: int,
    concurrency: int,
    rate: float | None,
    prompt_words: int,
    shared_words: int,
    max_tokens: int,
    temperature: float,
    ignore_eos: bool,
    seed: int,
    as_json: bool,
) -> None:
    from cortex_cli import benchmark

    plan = benchmark.Plan(
        model=model,
        requests=requests,
        concurrency=concurrency,
        rate=rate,
        prompt_words=prompt_words,
        shared_words=shared_words,
        max_tokens=max_tokens,
        temperature=temperature,
        ignore_eos=ignore_eos,
        seed=seed,
    )
    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=as_json) as progress:
        bar = progress.add_task("requests", total=requests)
        report = asyncio.run(
            benchmark.run(
                endpoint,
                plan,
                api_key=os.environ.get("OPENAI_API_KEY"),
                on_answer=lambda answer: progress.advance(bar),
            )
        )
    if as_json:
        click.echo(msgspec.json.encode(report))
    else:
        _show(report)
    if report.failed:
        raise click.exceptions.Exit(EXIT_FAILED)


def _show(report: object) -> None:
    from cortex_cli.benchmark import Report, Spread

    assert isinstance(report, Report)
    table = Table("", "mean", "p50", "p90", "p95", "p99", "max", title=f"{report.plan.model} at {report.endpoint}")
    rows: tuple[tuple[str, Spread | None], ...] = (
        ("time to first token, ms", report.first_token_s),
        ("between chunks, ms", report.gap_s),
        ("per output token, ms", report.token_s),
        ("whole answer, ms", report.latency_s),
    )
    for name, found in rows:
        if found is not None:
            values = (found.mean, found.p50, found.p90, found.p95, found.p99, found.max)
            table.add_row(name, *(f"{value * 1000:.1f}" for value in values))
    console = Console()
    console.print(table)
    console.print(
        f"{report.completed} answers in {report.duration_s:.2f} s: {report.requests_per_s:.2f} requests/s, "
        f"{report.output_tokens_per_s:.1f} output tokens/s "
        f"({report.prompt_tokens} prompt and {report.output_tokens} output tokens)"
    )
    for error, count in sorted(report.errors.items()):
        console.print(f"{count} failed: {error}")

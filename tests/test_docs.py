"""The documentation is part of the build: what exists is documented, and what is documented exists."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec
import pytest
from cortex_cli.main import cli
from cortex_core.catalogue import Catalogue
from cortex_core.config import parse_config
from cortex_core.gateway_config import GatewayConfig

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(
    [
        *DOCS.rglob("*.md"),
        *ROOT.glob("*.md"),
        *ROOT.glob("packages/*/README.md"),
        *ROOT.glob("rpm/*.md"),
        *ROOT.glob("findings/*.md"),
    ]
)


def options(command: click.Command, path: str) -> Iterator[tuple[str, str]]:
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            yield from ((path, name) for name in (*parameter.opts, *parameter.secondary_opts))
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            yield f"{path} {name}", ""
            yield from options(child, f"{path} {name}")


@pytest.mark.parametrize("name", ["cortex", "neuron"])
def test_every_command_and_option_is_documented(name: str) -> None:
    from neuron.daemon.cli import cli as neuron_cli

    text = (DOCS / "reference" / "cli.md").read_text()
    undocumented = []
    for path, option in options(cli if name == "cortex" else neuron_cli, name):
        rows = [line for line in text.splitlines() if f"`{path}" in line]
        if not rows or not any(option in row for row in rows):
            undocumented.append(f"{path} {option}")
    assert not undocumented


def structs_in(type_: object) -> list[type[msgspec.Struct]]:
    """The structs a field's type mentions, through optionals, tuples, lists and mappings."""
    if isinstance(type_, type) and issubclass(type_, msgspec.Struct):
        return [type_]
    return [found for argument in getattr(type_, "__args__", ()) for found in structs_in(argument)]


def keys(type_: type[msgspec.Struct], prefix: str = "") -> Iterator[str]:
    """Dotted keys of the leaves, `[]` after lists and `<scheme>` for the names of a mapping."""
    for field in msgspec.structs.fields(type_):
        name = f"{prefix}{field.encode_name}"
        origin = getattr(field.type, "__origin__", None)
        for nested in structs_in(field.type):
            suffix = "[]." if origin in (tuple, list) else ".<scheme>." if origin is dict else "."
            yield from keys(nested, name + suffix)
        if not structs_in(field.type):
            yield name


WITHOUT_EFFECT = ("harness.candle.context_limit.", "harness.candle.image.", "harnesses[].")


@pytest.mark.parametrize("name", ["cortex", "models", "neuron"])
def test_every_configuration_key_is_documented(name: str) -> None:
    from neuron.daemon.common.config import NeuronConfig

    type_: type[msgspec.Struct] = {"cortex": GatewayConfig, "models": Catalogue, "neuron": NeuronConfig}[name]
    text = (DOCS / "reference" / "configuration.md").read_text()
    missing = []
    for key in keys(type_):
        parent, _, leaf = key.rpartition(".")
        listed_in_its_row = any(f"`{parent}" in row and f"`{leaf}`" in row for row in text.splitlines())
        if f"`{key}`" not in text and not listed_in_its_row and not key.startswith(WITHOUT_EFFECT):
            missing.append(key)
    # These are named in the paragraph on keys of the reference system.
    prose = text[text.index("Accepted from files of the reference system") :]
    missing = [key for key in missing if f"`{key.rpartition('.')[2]}`" not in prose]
    assert not missing


def test_every_field_of_an_access_line_is_documented() -> None:
    from cortex_gateway.observability.access_log import AccessRecord

    page = (DOCS / "reference" / "logs.md").read_text()
    rows = [row.split("|")[1] for row in page.splitlines() if row.startswith("| `")]
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert documented == set(AccessRecord.__struct_fields__)


def test_internal_links_lead_somewhere() -> None:
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in PAGES
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert not broken


LEARNINGS = {"failures.md": {"F": 36}, "learnings.md": {"N": 25, "G": 20}}
REASONS = ("cannot happen", "not here yet", "a way of working")


@pytest.mark.parametrize("name", LEARNINGS)
def test_every_learning_has_a_test_that_exists_or_a_reason(name: str) -> None:
    page = (DOCS / "explanation" / name).read_text()
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    defined = set(re.findall(r"^\s*(?:async )?def (test_\w+)\(", sources, re.M))
    defined |= set(re.findall(r"^(test_\w+) = \w+\.TestCase$", sources, re.M))
    named = set(re.findall(r"`(test_\w+)`", page))
    assert named and not named - defined, f"{name} names tests that do not exist: {named - defined}"
    for letter, count in LEARNINGS[name].items():
        rows = {int(number): rest for number, rest in re.findall(rf"^\| {letter}(\d+) (.*)$", page, re.M)}
        assert sorted(rows) == list(range(1, count + 1))
        for number, rest in rows.items():
            has_reason = rest.partition(" | ")[2].startswith(REASONS)
            assert f"`test_{letter}{number}_" in rest or has_reason, f"{letter}{number} has neither a test nor a reason"


def toml_blocks() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for number, block in enumerate(re.findall(r"```toml\n(.*?)```", page.read_text(), re.S)):
            yield f"{page.relative_to(ROOT)}#{number}", block
    for path in sorted(ROOT.glob("examples/*.toml")):
        yield str(path.relative_to(ROOT)), path.read_text()
        yield f"{path.relative_to(ROOT)}, all of it", with_everything_on(path.read_text())


def with_everything_on(text: str) -> str:
    """An example with what is off in it, turned on: lines that begin with # and no space."""
    return re.sub(r"^#(?=\S)", "", text, flags=re.M)


@pytest.mark.parametrize(("name", "block"), list(toml_blocks()), ids=lambda value: value if "\n" not in value else "")
def test_every_toml_example_is_accepted(name: str, block: str) -> None:
    from neuron.daemon.common.config import NeuronConfig

    data = tomllib.loads(block)
    if "models" in data or "aliases" in data or name.endswith("models.toml"):
        parse_config(Catalogue, block, name=name)
    elif data.keys() & {"neurons", "gateway", "entitlements"}:
        parse_config(GatewayConfig, block, name=name)
    else:
        parse_config(NeuronConfig, block, name=name)


def test_examples_show_what_is_off() -> None:
    for path in sorted(ROOT.glob("examples/*.toml")):
        assert tomllib.loads(path.read_text()) != tomllib.loads(with_everything_on(path.read_text())), path


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "index.md").read_text()
    linked = {(DOCS / target).resolve() for target in re.findall(r"\]\(([^)#\s]+)", index)}
    assert {page for page in DOCS.rglob("*.md") if page != DOCS / "index.md"} <= linked


def test_every_place_named_to_contributors_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = text[text.index("## Where do I change") : text.index("## Versions and releases")]
    files = set(re.findall(r"`((?:cortex|neuron)_?\w*/[\w/*.]*)`", table))
    assert len(files) > 30
    sources = list(ROOT.glob("packages/*/src"))
    assert not [name for name in files if not any(list(source.glob(name)) for source in sources)]
    pages = set(re.findall(r"(?<![\w/])((?:docs|rpm)/[\w/.-]+\.md)", table))
    assert not [name for name in pages if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "justfile"])
def test_every_test_that_is_named_to_contributors_exists(page: str) -> None:
    named = set(re.findall(r"tests/[\w/.]+", (ROOT / page).read_text()))
    assert named and not [name for name in named if not (ROOT / name).exists()]


def test_slow_tests_that_are_named_exist() -> None:
    for name in (ROOT / "tests" / "slow_tests.txt").read_text().split():
        path, _, test = name.partition("::")
        text = (ROOT / path).read_text()
        assert re.search(rf"\b{test.rpartition('::')[2]}\b", text), name


def test_nothing_is_imported_from_a_conftest_or_a_test_module() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {line}"
        for path in (ROOT / "tests").rglob("*.py")
        if "cortex_gateway" not in path.parts and path.parent.name != "access"
        for line in re.findall(r"^from tests[\w.]*\.(?:conftest|test_\w+) import .*", path.read_text(), re.M)
    ]
    assert not found


def test_every_finding_is_listed_and_says_which_version() -> None:
    listed = (ROOT / "findings" / "README.md").read_text()
    for path in sorted((ROOT / "findings").glob("*.sh")):
        assert f"]({path.name})" in listed, path.name
        shebang, first, *_ = path.read_text().splitlines()
        assert shebang == "#!/usr/bin/env bash" and re.match(r"# \S+ \d[\w.]*: ", first), path.name


def test_the_readme_and_ci_run_the_same_test_command() -> None:
    command = "uv run pytest -n 2\n"
    assert f"&& {command}" in (ROOT / "README.md").read_text()
    assert f"\n{command}" in (ROOT / ".ci" / "run").read_text()

"""The packages fit each other, and each says what changed. uv does not check ranges between workspace members."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PACKAGES = {
    project["name"]: (path.parent, project)
    for path in sorted((ROOT / "packages").glob("*/pyproject.toml"))
    for project in [tomllib.loads(path.read_text())["project"]]
}


def test_all_packages_are_here() -> None:
    names = {"cortex-core", "cortex-gateway", "neuron", "neuron-cpu", "cortex-cli"}
    assert set(PACKAGES) == {f"helexa-{name}" for name in names}


@pytest.mark.parametrize("name", sorted(PACKAGES))
def test_ranges_between_packages_admit_the_versions_in_the_tree(name: str) -> None:
    _, project = PACKAGES[name]
    extras = [line for lines in project.get("optional-dependencies", {}).values() for line in lines]
    for line in project["dependencies"] + extras:
        requirement = Requirement(line)
        if requirement.name in PACKAGES:
            version = Version(PACKAGES[requirement.name][1]["version"])
            assert requirement.specifier.contains(version, prereleases=True), f"{name} requires {line}"


@pytest.mark.parametrize("name", sorted(PACKAGES))
def test_a_package_stands_alone(name: str) -> None:
    folder, project = PACKAGES[name]
    assert f"## [{project['version']}]" in (folder / "CHANGELOG.md").read_text()
    assert (
        project["license"] == "GPL-3.0-or-later" and (folder / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    )
    assert len((folder / "README.md").read_text()) > 400
    assert list((folder / "src").glob("*/py.typed"))

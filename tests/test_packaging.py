"""What the packages install, read from their files: each of these has failed in production once."""

from __future__ import annotations

import configparser
import re
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest
from cortex_core.gateway_config import GatewayConfig, load_gateway_config

RPM = Path(__file__).parent.parent / "rpm"
SPECS = {"cortex": RPM / "cortex.spec", "neuron": RPM / "helexa-neuron.spec"}
PORTS = {"cortex": {"31313", "31314"}, "helexa-neuron": {"13131"}}


def unit(path: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(path.read_text())
    return parser


def test_G1_the_packaged_configuration_finds_the_packaged_catalogue(tmp_path: Path) -> None:
    """By an absolute path; a relative one is meant beside the file, never beside whatever folder a service runs in."""
    packaged = load_gateway_config(RPM / "cortex" / "cortex.toml")
    assert packaged.models_config == GatewayConfig().models_config == "/etc/cortex/models.toml"
    spec = SPECS["cortex"].read_text()
    assert re.search(r"^install .* files/models\.toml %\{buildroot\}%\{_sysconfdir\}/cortex/models\.toml$", spec, re.M)
    service = unit(RPM / "cortex" / "cortex.service")["Service"]
    assert "--config /etc/cortex/cortex.toml" in service["ExecStart"]
    config = tmp_path / "cortex.toml"
    config.write_text('models_config = "models.toml"\n')
    assert load_gateway_config(config).models_config == str(tmp_path / "models.toml")


def test_packaged_configuration_files_are_the_examples() -> None:
    examples = RPM.parent / "examples"
    packaged = sorted(RPM.glob("*/*.toml"))
    assert [path.name for path in packaged] == ["cortex.toml", "models.toml", "neuron.toml"]
    for path in packaged:
        assert path.is_symlink() and path.resolve() == (examples / path.name).resolve()


@pytest.mark.parametrize(("name", "folder"), [("cortex", "cortex"), ("neuron", "neuron")])
def test_G12_a_service_has_a_home_to_write_to(name: str, folder: str) -> None:
    service = unit(RPM / folder / f"{name}.service")["Service"]
    assert service["StateDirectory"] == service["User"] == name
    assert f"-d /var/lib/{name} " in SPECS[name].read_text(), "the user's home is the state directory"
    assert f" /var/lib/{name}" in (RPM / folder / f"{name}.sysusers").read_text()


@pytest.mark.parametrize("name", SPECS)
def test_G13_a_package_provides_the_user_that_it_requires(name: str) -> None:
    spec = SPECS[name].read_text()
    assert f"Provides:       user({name})" in spec and f"Provides:       group({name})" in spec
    assert "AutoReqProv:    no" in spec
    assert not re.search(r"^%attr", spec[spec.index("%files") :], re.M)


def test_G14_the_neurons_package_has_a_name_of_its_own() -> None:
    spec = SPECS["neuron"].read_text()
    assert re.search(r"^Name:\s+helexa-neuron$", spec, re.M)
    assert not re.search(r"^Provides:\s+neuron\b", spec, re.M)


@pytest.mark.parametrize(("folder", "name"), [("cortex", "cortex"), ("neuron", "helexa-neuron")])
def test_G15_the_firewall_opens_the_ports_that_are_used(folder: str, name: str) -> None:
    service = ElementTree.parse(RPM / folder / f"{name}.firewalld.xml").getroot()
    assert {port.get("port") for port in service.iter("port")} == PORTS[name]
    spec = SPECS[folder].read_text()
    assert f"%{{_prefix}}/lib/firewalld/services/{name}.xml" in spec, (
        "a vendor's file: what is under /etc is the host's"
    )
    if folder == "cortex":
        defaults = GatewayConfig().gateway
        used = {defaults.listen.rpartition(":")[2], defaults.metrics_listen.rpartition(":")[2]}
        assert used == PORTS[name]
        assert "%posttrans" in spec, "a stale definition under /etc would win over ours"


@pytest.mark.parametrize("name", ["cortex", "neuron"])
def test_O2_a_unit_asks_for_descriptors(name: str) -> None:
    """systemd's own default is a soft limit of 1,024, and whatever the host says for the hard one."""
    assert int(unit(RPM / name / f"{name}.service")["Service"]["LimitNOFILE"]) >= 16_384


@pytest.mark.parametrize("name", ["cortex", "neuron"])
def test_H8_watchdog_a_unit_restarts_a_daemon_that_is_silent(name: str) -> None:
    """systemd's rules for it: the main process alone is heard, and what a watchdog ends is a failure."""
    service = unit(RPM / name / f"{name}.service")["Service"]
    assert (service["Type"], service["NotifyAccess"], service["WatchdogSignal"]) == ("notify", "main", "SIGABRT")
    assert service["WatchdogSec"] == "30s" and service["LimitCORE"] == "0"
    assert service["Restart"] in ("on-failure", "on-abnormal", "on-watchdog", "always")
    assert int(service["TimeoutAbortSec"].rstrip("s")) < int(service["TimeoutStopSec"].rstrip("s"))
    assert "AF_UNIX" in service["RestrictAddressFamilies"].split(), "it tells systemd by a socket"


def distributions(requirements: list[str]) -> set[str]:
    names = {re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0] for requirement in requirements}
    return {name for name in names if not name.startswith("helexa-")}


def test_the_gateways_package_asks_for_what_its_wheels_ask_for() -> None:
    """`fast` is installed unless somebody is against it, the other extras when somebody is for them."""
    spec = SPECS["cortex"].read_text()
    wanted: dict[str, set[str]] = {"Requires": set(), "Recommends": set(), "Suggests": set()}
    for package in ("cortex-core", "cortex-gateway", "cortex-cli"):
        project = tomllib.loads((RPM.parent / "packages" / package / "pyproject.toml").read_text())["project"]
        wanted["Requires"] |= distributions(project["dependencies"])
        for extra, requirements in project.get("optional-dependencies", {}).items():
            wanted["Recommends" if extra == "fast" else "Suggests"] |= distributions(requirements)
    for tag, names in wanted.items():
        assert set(re.findall(r"python3dist\(([^)]+)\)", "".join(re.findall(rf"^{tag}:.*$", spec, re.M)))) == names, tag


def test_the_neurons_environment_is_filled_with_all_of_its_extras() -> None:
    assert re.search(r"^ *uv export --locked --package helexa-neuron --all-extras ", (RPM / "build").read_text(), re.M)


def test_G16_the_file_that_may_hold_keys_is_not_for_everybody() -> None:
    spec = SPECS["cortex"].read_text()
    assert re.search(r"^install -Dpm0640 files/cortex\.toml ", spec, re.M)
    after = spec[spec.index("\n%post\n") : spec.index("\n%preun\n")]
    assert "chgrp cortex" in after and "chmod 0640" in after, "converged on upgrades, too"
    assert unit(RPM / "cortex" / "cortex.service")["Service"]["UMask"] == "0077"

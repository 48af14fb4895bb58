"""The secret between gateways and neurons: where it is, how it travels, who is believed."""

from __future__ import annotations

from pathlib import Path

import pytest
from cortex_core.config import ConfigError
from cortex_core.fleet_secret import (
    FleetSecrets,
    absolute_places,
    header_value,
    places_of,
    resolve_secrets,
    without_claims,
)
from cortex_core.hop import SECRET_HEADER
from hypothesis import given
from hypothesis import strategies as st

SECRETS = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters=","), min_size=1, max_size=40)
NAME = SECRET_HEADER.encode()


def presented(value: str) -> list[tuple[bytes, bytes]]:
    return [(b"host", b"x"), (NAME, value.encode())]


@given(st.lists(SECRETS, max_size=4), st.lists(SECRETS, min_size=1, max_size=4))
def test_O13_a_gateway_is_known_by_any_secret_that_both_have(ours: list[str], theirs: list[str]) -> None:
    standing = FleetSecrets(ours).standing(presented(header_value(theirs)))
    assert standing == ("proven" if set(ours) & set(theirs) else "wrong")
    assert FleetSecrets(ours).standing([(NAME, secret.encode()) for secret in theirs]) == standing


def test_O13_nothing_is_wrong_and_missing_is_told_from_it() -> None:
    secrets = FleetSecrets(["s" * 20])
    assert secrets.standing([(b"host", b"x")]) == "missing"
    for value in ("", " ", ",", "s", "s" * 19, "s" * 21, "S" * 20, ", ".join("x" * 9), "x\xff"):
        assert secrets.standing([(NAME, value.encode("latin-1"))]) == "wrong"
    # So many at most are looked at: a header cannot make a neuron hash thousands.
    assert secrets.standing([(NAME, b",".join([b"x"] * 8 + [b"s" * 20]))]) == "wrong"
    assert FleetSecrets([]).standing([(NAME, b"")]) == "wrong"


def test_O13_what_is_not_believed_is_gone_and_the_secret_always_is() -> None:
    headers = [
        (b"host", b"x"),
        (NAME, b"s"),
        (b"x-cortex-principal", b"boss"),
        (b"x-helexa-account-id", b"boss"),
        (b"x-helexa-key-id", b"boss"),
        (b"x-cortex-hop", b"1"),
        (b"x-cortex-resume", b"12"),
        (b"x-cortex-resolved-model", b"m"),
    ]
    assert without_claims(headers, is_believed=False) == [(b"host", b"x"), (b"x-cortex-resolved-model", b"m")]
    assert without_claims(headers, is_believed=True) == [pair for pair in headers if pair[0] != NAME]


def test_O13_places_are_read_and_faults_name_them_and_no_secret(tmp_path: Path) -> None:
    (tmp_path / "new").write_text("second-secret\n")
    references = absolute_places(("env:FLEET", "file:new"), tmp_path)
    assert places_of(references) == ("env:FLEET", f"file:{tmp_path}/new")
    assert resolve_secrets(references, {"FLEET": "first-secret"}, where="gateway.secret") == (
        "first-secret",
        "second-secret",
    )
    assert resolve_secrets(absolute_places("file:new", tmp_path), {}, where="x") == ("second-secret",)
    (tmp_path / "new").write_text("sec,ret")
    with pytest.raises(ConfigError) as faults:
        resolve_secrets(references, {}, where="gateway.secret")
    assert len(faults.value.faults) == 2 and all(fault.startswith("gateway.secret: ") for fault in faults.value.faults)
    assert "sec,ret" not in str(faults.value) and "comma" in str(faults.value)

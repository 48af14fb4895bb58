"""Where a request comes from, read from headers that may be anything: names, addresses, origins."""

from __future__ import annotations

import ipaddress

import pytest
from cortex_core.http_access import (
    Authority,
    HostRules,
    Origin,
    OriginRules,
    Refused,
    host_pattern_faults,
    is_loopback,
    origin_pattern_faults,
    parse_authority,
    parse_origin,
    read_visit,
)
from cortex_core.serving.log_lines import Sparing
from hypothesis import given
from hypothesis import strategies as st

LABELS = st.from_regex(r"[a-z0-9_]([a-z0-9_-]{0,10}[a-z0-9_])?", fullmatch=True)
NAMES = st.lists(LABELS, min_size=2, max_size=4).map(".".join).filter(lambda name: not name.split(".")[-1][0].isdigit())
PORTS = st.none() | st.integers(0, 65535)
DEFAULT = HostRules((), ("gpu1", "gpu1.lab.example"))


def written(host: str, port: int | None) -> bytes:
    return (f"[{host}]" if ":" in host else host).encode() + (b"" if port is None else b":%d" % port)


def refusal(*headers: tuple[bytes, bytes], target: bytes = b"/", rules: HostRules = DEFAULT) -> Refused:
    with pytest.raises(Refused) as refused:
        rules.check(read_visit(headers, target).host, server="neuron", where="server")
    assert refused.value.reason == "host"
    return refused.value


# ---------------------------------------------------------------------------------------------- Host


@given(NAMES, PORTS, st.booleans(), st.booleans())
def test_H6_a_name_is_read_whatever_its_case_its_port_and_the_dot_at_its_end(
    name: str, port: int | None, has_dot: bool, is_upper: bool
) -> None:
    text = (name.upper() if is_upper else name) + ("." if has_dot else "")
    assert parse_authority(written(text, port)) == Authority(name, port, is_address=False)


@given(st.ip_addresses(), PORTS)
def test_H6_every_address_is_one_whatever_its_port(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int | None
) -> None:
    parsed = parse_authority(written(str(address), port))
    assert parsed == Authority(str(address), port, is_address=True)
    assert DEFAULT.allows(parsed)
    assert is_loopback(parsed.host) == (getattr(address, "ipv4_mapped", None) or address).is_loopback
    if isinstance(address, ipaddress.IPv6Address):
        assert parse_authority(written(address.exploded.upper(), port)) == parsed


@given(st.binary(max_size=60))
def test_H6_no_header_makes_the_reader_fail_and_what_it_reads_is_plain(value: bytes) -> None:
    parsed = parse_authority(value)
    if parsed is not None:
        assert parsed.host and set(parsed.host) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-_:%~")
        assert parsed.port is None or 0 <= parsed.port <= 65535
    origin = parse_origin(value)
    assert origin is None or b"://" in value
    try:
        visit = read_visit([(b"host", value), (b"origin", value)], value)
    except Refused as refused:
        assert refused.error.status == 400 and "\n" not in refused.advice
    else:
        assert visit.page in (None, b"", value)


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b" ",
        b".",
        b"a..b",
        b".a",
        b"a b",
        b"a,b",
        b"user@localhost",
        b"user:pass@localhost",
        b"localhost@evil.example",
        b"localhost:31313@evil.example",
        b"localhost#.evil.example",
        b"localhost/.evil.example",
        b"http://localhost",
        b"localhost:",
        b"localhost:x",
        b"localhost:-1",
        b"localhost:+1",
        b"localhost:65536",
        b"localhost:000080",
        b"localhost:\xb2",
        b"localhost:1:2",
        b"::1",
        b"[::1",
        b"::1]",
        b"[::1]x",
        b"[::1]:x",
        b"[localhost]",
        b"[127.0.0.1]",
        b"[]",
        b"[::1%]",
        b"[fe80::1%<b>]",
        b"2130706433",
        b"0x7f000001",
        b"0x7f.0.0.1",
        b"017700000001",
        b"0177.0.0.1",
        b"127.1",
        b"127.0.0.01",
        b"127.0.0.1.2",
        b"127.0.0.256",
        b"a.0x",
        "b\N{LATIN SMALL LETTER U WITH DIAERESIS}cher.example".encode(),
        b"\xff\xfe",
        b"a\0b",
        b"a" * 64 + b".example",
        b".".join([b"a" * 60] * 5),
    ],
)
def test_H6_what_names_no_host_is_none(value: bytes) -> None:
    # An empty port is allowed by the grammar of URIs, and nothing else of these.
    assert parse_authority(value) == (
        Authority("localhost", None, is_address=False) if value == b"localhost:" else None
    )


@pytest.mark.parametrize(
    "host",
    [
        b"127.0.0.1",
        b"127.0.0.1:13131",
        b"192.0.2.7:80",
        b"0.0.0.0",
        b"[::1]:13131",
        b"[2001:db8::7]",
        b"[::ffff:192.0.2.7]:1",
        b"[fe80::1%25eth0]:13131",
        b"localhost",
        b"LOCALHOST:31313",
        b"localhost.",
        b"app.localhost:3000",
        b"gpu1:13131",
        b"GPU1.lab.example",
        b"gpu1.lab.example.:13131",
        b"printer.local",
        b"cortex.default.svc.cluster.local",
        b"neuron:13131",
        b"my_service",
        b"xn--bcher-kva",
    ],
)
def test_H6_addresses_localhost_own_names_local_and_names_without_a_dot_are_answered_to(host: bytes) -> None:
    DEFAULT.check(read_visit([(b"host", host)]).host, server="neuron", where="server")


@pytest.mark.parametrize(
    "host",
    [
        b"evil.example",
        b"EVIL.example:13131",
        b"localhost.evil.example",
        b"127.0.0.1.evil.example",
        b"127.0.0.1.nip.io",
        b"evil-localhost.example",
        b"local.example",
        b"evillocal.example:13131",
        b"gpu1.lab.example.evil.example",
        b"evilgpu1.lab.example",
        b"lab.example",
        b"xn--bcher-kva.example",
    ],
)
def test_H6_any_other_name_is_refused_with_421_and_the_line_that_would_allow_it(host: bytes) -> None:
    refused = refusal((b"host", host))
    name = host.decode().lower().partition(":")[0]
    assert (refused.error.status, refused.error.code) == (421, "host_not_allowed")
    assert f'put into [server]: allowed_hosts = ["{name}"]' in refused.advice
    assert name in refused.error.message and "server.allowed_hosts" in refused.error.message


def test_H6_evil_localhost_is_no_loopback() -> None:
    """A name without a dot is answered to, since nobody on the web can have one. It opens nothing that is local."""
    for name in ("evil-localhost", "localhost.evil.example", "127.0.0.1.evil.example", "localhostx", "127.0.0.1x", ""):
        assert not is_loopback(name)
    for name in ("localhost", "127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"):
        assert is_loopback(name)


def test_H6_the_line_holds_what_is_allowed_already() -> None:
    rules = HostRules(("cortex.example", "*.lab.example"))
    refused = refusal((b"host", b"evil.example"), rules=rules)
    assert 'allowed_hosts = ["cortex.example", "*.lab.example", "evil.example"]' in refused.advice


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("cortex.example", ["cortex.example", "CORTEX.example.:8443"], ["a.cortex.example", "xcortex.example"]),
        ("*.lab.example", ["a.lab.example", "a.b.lab.example"], ["lab.example", "xlab.example"]),
        (".lab.example", ["lab.example", "a.lab.example"], ["xlab.example", "example"]),
        ("Cortex.Example.", ["cortex.example"], ["cortex.example.org"]),
        ("*", ["evil.example", "a.b.c.d"], []),
    ],
)
def test_H6_patterns_allow_names_below(pattern: str, yes: list[str], no: list[str]) -> None:
    assert not list(host_pattern_faults([pattern]))
    rules = HostRules([pattern])
    for name in yes:
        rules.check(parse_authority(name.encode()), server="gateway", where="gateway")
    for name in no:
        parsed = parse_authority(name.encode())
        assert parsed is not None and (not rules.allows(parsed) or "." not in name)


@given(NAMES, NAMES)
def test_H6_a_pattern_allows_its_own_subdomains_and_no_name_that_only_looks_so(zone: str, name: str) -> None:
    rules = HostRules([f"*.{zone}"])
    for given_name, is_below in (
        (f"{name}.{zone}", True),
        (zone, False),
        (f"x{zone}", False),
        (f"{zone}.{name}", None),
    ):
        authority = parse_authority(given_name.encode())
        if authority is not None and is_below is not None and not given_name.endswith((".local", ".localhost")):
            assert rules.allows(authority) == (is_below or given_name.endswith(f".{zone}"))


@pytest.mark.parametrize(
    "pattern",
    ["", "http://cortex.example", "cortex.example:443", "cortex.example:", "a b", "**", "*.*.x", "b\xfc.de", "*x"],
)
def test_H6_a_setting_that_is_no_pattern_is_a_fault_that_names_it(pattern: str) -> None:
    (fault,) = host_pattern_faults(["good.example", pattern])
    assert f"`{pattern}`" in fault


def test_H6_a_host_that_is_missing_comes_from_no_browser_and_one_that_is_there_twice_from_nobody_honest() -> None:
    assert read_visit([]).host is None
    DEFAULT.check(None, server="neuron", where="server")
    for second in (b"localhost", b"evil.example"):
        refused = refusal((b"host", b"localhost"), (b"host", second))
        assert (refused.error.status, refused.error.code) == (400, "invalid_host")


@pytest.mark.parametrize(
    ("target", "is_refused"),
    [
        (b"/models", False),
        (b"*", False),
        (b"http://localhost:13131/models", False),
        (b"HTTP://LOCALHOST:13131", False),
        (b"http://localhost:13131?x=http://evil.example/", False),
        (b"http://evil.example/models", True),
        (b"http://localhost/models", True),
        (b"http://localhost:13131@evil.example/", True),
        (b"http://user@localhost:13131/", True),
        (b"localhost:13131", True),
        (b"ftp://localhost:13131/", True),
        (b"//", False),
        (b"", True),
    ],
)
def test_H6_a_request_line_that_asks_for_another_host_is_refused(target: bytes, is_refused: bool) -> None:
    headers = ((b"host", b"localhost:13131"),)
    if is_refused:
        assert refusal(*headers, target=target).error.code == "invalid_host"
    else:
        assert read_visit(headers, target).host == Authority("localhost", 13131, is_address=False)


def test_H6_forwarded_names_are_not_believed() -> None:
    refused = refusal(
        (b"host", b"evil.example"), (b"x-forwarded-host", b"localhost"), (b"forwarded", b"host=localhost")
    )
    assert refused.error.code == "host_not_allowed"


# ---------------------------------------------------------------------------------------------- Origin


def page(host: bytes | None, origin: bytes | None, *more: tuple[bytes, bytes]) -> bytes | None:
    headers = [(b"host", host)] if host is not None else []
    headers += [(b"origin", origin)] if origin is not None else []
    return read_visit([*headers, *more]).page


@given(NAMES | st.ip_addresses().map(str), PORTS, st.sampled_from(["http", "https"]))
def test_O14_a_page_is_of_this_server_where_host_and_port_are_the_same(
    host: str, port: int | None, scheme: str
) -> None:
    authority = written(host, port)
    assert page(authority, scheme.encode() + b"://" + authority) is None
    other = written(host, 1 if port != 1 else 2)
    assert page(authority, scheme.encode() + b"://" + other) == scheme.encode() + b"://" + other


@pytest.mark.parametrize(
    ("host", "origin", "is_own"),
    [
        (b"localhost:31313", b"http://localhost:31313", True),
        (b"localhost:31313", b"http://LOCALHOST:31313", True),
        (b"localhost:31313", b"http://localhost:3000", False),
        (b"localhost:31313", b"http://localhost", False),
        (b"localhost:31313", b"http://127.0.0.1:31313", False),
        (b"127.0.0.1:31313", b"http://localhost:31313", False),
        (b"[::1]:31313", b"http://[::1]:31313", True),
        (b"[::1]:31313", b"http://[0:0:0:0:0:0:0:1]:31313", True),
        (b"cortex.example", b"https://cortex.example", True),
        (b"cortex.example", b"https://cortex.example:443", True),
        (b"cortex.example:443", b"https://cortex.example", True),
        (b"cortex.example", b"http://cortex.example", True),
        (b"cortex.example", b"https://cortex.example:8443", False),
        (b"cortex.example", b"https://evil.example", False),
        (b"cortex.example", b"https://cortex.example.evil.example", False),
        (b"cortex.example", b"https://x.cortex.example", False),
        (b"localhost", b"vscode-webview://localhost", False),
        (b"localhost", b"null", False),
        (None, b"http://localhost", False),
    ],
)
def test_O14_the_port_is_part_of_an_origin(host: bytes | None, origin: bytes, is_own: bool) -> None:
    assert page(host, origin) == (None if is_own else origin)


@pytest.mark.parametrize(
    "origin",
    [
        b"",
        b"http://",
        b"http://a b",
        b"http://localhost/",
        b"http://x@localhost",
        b"localhost",
        b"null null",
        b"NULL",
        b"http://localhost http://evil.example",
        b"http://\xff",
        b"://localhost",
        b"*",
        b"http://0x7f000001",
    ],
)
def test_O14_an_origin_that_is_none_is_a_page_that_nobody_knows(origin: bytes) -> None:
    assert page(b"localhost", origin) == b""
    assert not OriginRules(["*"]).allows(b"")


def test_O14_two_origins_are_none() -> None:
    assert page(b"localhost", b"http://localhost", (b"origin", b"http://localhost")) == b""


@pytest.mark.parametrize(
    ("site", "is_own"),
    [
        (b"none", True),
        (b"same-origin", True),
        (b"same-site", False),
        (b"cross-site", False),
        (b"", False),
        (b"x", False),
    ],
)
def test_H6_what_the_browser_says_of_the_site_counts_without_an_origin_too(site: bytes, is_own: bool) -> None:
    assert page(b"localhost", None, (b"sec-fetch-site", site)) == (None if is_own else b"")
    own = b"http://localhost"
    assert page(b"localhost", own, (b"sec-fetch-site", site)) == (None if is_own else own)
    assert page(b"localhost", b"http://evil.example", (b"sec-fetch-site", site)) == b"http://evil.example"


def test_H6_programs_send_neither() -> None:
    assert page(b"localhost", None) is None


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        (
            "https://app.example",
            ["https://app.example", "https://APP.example:443"],
            ["http://app.example", "https://app.example:8443", "https://x.app.example", "null"],
        ),
        ("http://localhost:3000", ["http://localhost:3000"], ["http://localhost", "http://localhost:31313"]),
        (
            "https://*.app.example",
            ["https://a.app.example", "https://a.b.app.example"],
            ["https://app.example", "https://xapp.example", "http://a.app.example", "https://a.app.example:8443"],
        ),
        ("vscode-webview://*", ["vscode-webview://0a1b2c", "vscode-webview://x"], ["https://x", "vscode-webviewx://x"]),
        ("app://obsidian.md", ["app://obsidian.md"], ["app://other", "https://obsidian.md"]),
        ("file://", ["file://"], ["null", "file://x"]),
        ("null", ["null"], ["file://", "https://null"]),
        ("*", ["https://evil.example", "null", "file://", "app://x"], []),
    ],
)
def test_H6_origins_are_allowed_exactly_as_they_are_listed(pattern: str, yes: list[str], no: list[str]) -> None:
    assert not list(origin_pattern_faults([pattern]))
    rules = OriginRules([pattern])
    assert [origin for origin in (*yes, *no) if rules.allows(origin.encode())] == yes


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "app.example",
        "https://",
        "https://*",
        "http://*",
        "https://app.example/",
        "https://a/b",
        "https://x@a",
        "https://*.*.x",
        "*.example",
        "https:/a",
        "HTTPS//a",
    ],
)
def test_H6_a_setting_that_is_no_origin_is_a_fault_that_names_it(pattern: str) -> None:
    (fault,) = origin_pattern_faults(["https://app.example", pattern])
    assert f"`{pattern}`" in fault


def test_H6_a_refusal_tells_the_operator_the_line_and_the_page_nothing_of_it() -> None:
    refused = OriginRules(["null"]).refused(b"https://app.example", server="gateway", where="gateway")
    assert refused.reason == "origin" and refused.error.status == 403
    assert 'put into [gateway]: allow_origins = ["null", "https://app.example"]' in refused.advice
    closed = OriginRules([]).refused(b"https://app.example", server="gateway", where=None)
    assert "allow_origins" not in closed.advice + closed.error.message
    unknown = OriginRules([]).refused(b"", server="gateway", where="gateway")
    assert "allow_origins =" not in unknown.advice


@given(st.binary(max_size=300))
def test_H6_no_header_breaks_a_line_of_the_log(value: bytes) -> None:
    refused = OriginRules([]).refused(value, server="gateway", where="gateway")
    for text in (refused.advice, refused.error.message):
        assert text.isprintable() or all(ord(letter) >= 0x20 for letter in text)
        assert len(text) < 1500


def test_schemes_of_applications_have_no_port() -> None:
    assert parse_origin(b"vscode-webview://1a2b") == Origin("vscode-webview", "1a2b", None)
    assert parse_origin(b"https://a.example") == Origin("https", "a.example", 443)


# ---------------------------------------------------------------------------------------------- the log


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.floats(0, 30)), max_size=60))
def test_H6_a_flood_of_refusals_writes_few_lines_and_counts_the_rest(events: list[tuple[str, float]]) -> None:
    sparing = Sparing(window_s=60, max_lines=3)
    now, lines = 0.0, []
    for text, step in events:
        now += step
        line = sparing.line(text, now)
        lines += [(now, line)] if line is not None else []
    for began, _ in lines:
        window = [line for at, line in lines if began <= at < began + 60]
        assert len(window) <= 2 * 3
    counted = sum(int(line.split("(")[1].split()[0]) for _, line in lines if "(" in line)
    assert counted + len(lines) <= len(events)

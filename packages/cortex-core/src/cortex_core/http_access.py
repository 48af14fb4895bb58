"""Web pages that ask a server what they may not: told by the name that was asked for, and by the page's origin. Pure.

A page can send requests to whatever its browser reaches. Two headers, which no page can forge, give it away:

- `Host` is the name that was asked for. A page whose own name was pointed at this server (DNS rebinding) reads from it
  as from its own, and nothing but the name tells. So a server answers to IP addresses, `localhost`, the names of its
  host, `*.local`, names without a dot, and what it is told, and to no other. A page needs a name that its owner can
  point elsewhere, and no public name server gives anybody a name without a dot, or one under `.local`: hosts and
  containers of one's own network are called so.
- `Origin`, and `Sec-Fetch-Site` where the browser sends it, tell on behalf of which page a request is sent. Programs
  send neither.

`X-Forwarded-Host` and its kind are not looked at: whoever can send a request can send those.
"""

from __future__ import annotations

import functools
import ipaddress
import json
import re
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from cortex_core.errors import ApiError

RawHeaders = Iterable[tuple[bytes, bytes]]

Reason = Literal["host", "origin", "secret_missing", "secret_wrong"]
"""Why a request was refused at the door, as metrics count it."""
REASONS: tuple[Reason, ...] = ("host", "origin", "secret_missing", "secret_wrong")

HOST_NOT_ALLOWED = "host_not_allowed"
ORIGIN_NOT_ALLOWED = "origin_not_allowed"
SECRET_MISSING = "secret_missing"  # noqa: S105  (an error's code)
SECRET_WRONG = "secret_wrong"  # noqa: S105

MAX_NAME_LEN = 253
MAX_QUOTED = 128
"""Characters of a header that a message or a log line repeats."""

_TELLING = frozenset((b"host", b"origin", b"sec-fetch-site"))

DEFAULT_PORTS = {"http": 80, "https": 443}

_LABEL = re.compile(r"[a-z0-9_-]{1,63}")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_ZONE = re.compile(r"[a-z0-9._~-]{1,32}")
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]{0,63}")
_OPAQUE_HOST = re.compile(r"[a-z0-9._~:-]{0,253}")


class Authority(NamedTuple):
    """What a `Host` header names. host: in lower case, without a dot at its end; an IP address in its canonical form,
    without brackets. port: None where none is written."""

    host: str
    port: int | None
    is_address: bool


class Origin(NamedTuple):
    """What an `Origin` header names. port: the one that is meant, None for schemes that have none."""

    scheme: str
    host: str
    port: int | None


class Visit(NamedTuple):
    """A request, as far as its headers tell where it comes from.

    host: None where there is no such header (HTTP/1.0), which no browser leaves out. page: the `Origin` of a page that
    is not this server's own; empty where there is such a page and nobody can tell which; None for programs, and for
    pages of this server itself.
    """

    host: Authority | None
    page: bytes | None


class Refused(Exception):
    """A request that goes no further. `advice`: what an operator may do about it, for the log."""

    def __init__(self, reason: Reason, error: ApiError, *, advice: str) -> None:
        super().__init__(error.message)
        self.reason: Reason = reason
        self.error = error
        self.advice = advice


# ---------------------------------------------------------------------------------------------- reading headers


def read_visit(headers: RawHeaders, target: bytes = b"/") -> Visit:
    """Where a request comes from. target: as in its request line, where that may hold an authority of its own.

    Raises `Refused` for a `Host` that is malformed or there twice, and for a target that contradicts it.
    """
    found = [pair for pair in headers if pair[0] in _TELLING]
    host = _read_host([value for name, value in found if name == b"host"], target)
    if len(found) == (host is not None):
        return Visit(host, None)
    origins = [value for name, value in found if name == b"origin"]
    sites = [value for name, value in found if name == b"sec-fetch-site"]
    is_cross_site = any(site not in (b"same-origin", b"none") for site in sites)
    if not origins:
        return Visit(host, b"" if is_cross_site else None)
    origin = parse_origin(origins[0])
    if len(origins) > 1 or (origin is None and origins[0] != b"null"):
        return Visit(host, b"")
    is_own = origin is not None and host is not None and _is_same(origin, host)
    return Visit(host, None if is_own and not is_cross_site else origins[0])


@functools.lru_cache(maxsize=1024)
def parse_authority(value: bytes) -> Authority | None:
    """`name`, `name:port`, `192.0.2.1:port` or `[2001:db8::1]:port`; None for anything else.

    What a browser would read as another way to write an IPv4 address (`127.1`, `0x7f000001`, `2130706433`) is None as
    well: it never sends one.
    """
    try:
        text = value.decode("ascii").lower()
    except UnicodeDecodeError:
        return None
    if text.startswith("["):
        inside, bracket, rest = text[1:].partition("]")
        host, is_address = _ipv6(inside), True
        if not bracket or host is None or (rest and not rest.startswith(":")):
            return None
        port_text = rest[1:]
    else:
        name, _, port_text = text.partition(":")
        name = name.removesuffix(".")
        host, is_address = _ipv4(name), True
        if host is None:
            host, is_address = name, False
            if not _is_name(name):
                return None
    port = _port(port_text)
    return None if port is None and port_text else Authority(host, port, is_address)


@functools.lru_cache(maxsize=1024)
def parse_origin(value: bytes) -> Origin | None:
    """`scheme://host` or `scheme://host:port`; None for `null` and for anything else."""
    try:
        text = value.decode("ascii").lower()
    except UnicodeDecodeError:
        return None
    scheme, separator, rest = text.partition("://")
    if not separator or not _SCHEME.fullmatch(scheme):
        return None
    if scheme not in DEFAULT_PORTS:
        # Of applications: `vscode-webview://…`, `app://obsidian.md`, `file://`. What stands there is theirs to say.
        return Origin(scheme, rest, None) if _OPAQUE_HOST.fullmatch(rest) else None
    authority = parse_authority(rest.encode())
    if authority is None:
        return None
    return Origin(scheme, authority.host, DEFAULT_PORTS[scheme] if authority.port is None else authority.port)


def is_loopback(host: str) -> bool:
    """Whether a host, as `parse_authority` gives it or as a socket names its peer, is this machine and no other."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def _read_host(hosts: list[bytes], target: bytes) -> Authority | None:
    if len(hosts) > 1:
        raise _malformed("it is there more than once")
    host = None
    if hosts:
        host = parse_authority(hosts[0])
        if host is None:
            raise _malformed(f"{quoted(hosts[0])} is neither a name nor an address")
    if not target.startswith(b"/") and target != b"*":
        # The absolute form, as proxies are asked: what it names is what was asked for.
        scheme, _, rest = target.partition(b"://")
        named = parse_origin(scheme + b"://" + re.split(rb"[/?#]", rest, maxsplit=1)[0])
        if host is None or named is None or not _is_same(named, host):
            raise _malformed(f"the request line asks for {quoted(target)}")
    return host


def _is_same(origin: Origin, host: Authority) -> bool:
    """The scheme is left out: behind a proxy that ends TLS nobody here knows it."""
    port = host.port if host.port is not None else DEFAULT_PORTS.get(origin.scheme)
    return origin.scheme in DEFAULT_PORTS and (origin.host, origin.port) == (host.host, port)


def _ipv4(text: str) -> str | None:
    try:
        return str(ipaddress.IPv4Address(text))
    except ValueError:
        return None


def _ipv6(text: str) -> str | None:
    address, percent, zone = text.partition("%")
    if percent and not _ZONE.fullmatch(zone):
        return None
    try:
        return str(ipaddress.IPv6Address(address)) + percent + zone
    except ValueError:
        return None


def _is_name(text: str) -> bool:
    labels = text.split(".")
    is_number = _NUMBER.fullmatch(labels[-1]) is not None  # then the whole is an address, or nothing
    return len(text) <= MAX_NAME_LEN and not is_number and all(_LABEL.fullmatch(label) for label in labels)


def _port(text: str) -> int | None:
    return int(text) if text.isdecimal() and len(text) <= 5 and int(text) <= 65535 else None


def quoted(value: bytes) -> str:
    """A header as a message may repeat it."""
    return json.dumps(value[:MAX_QUOTED].decode("latin-1"))


# ---------------------------------------------------------------------------------------------- names


class HostRules:
    """The names that a server answers to: IP addresses, `localhost` and below, `.local`, names without a dot, its own,
    and `patterns`.

    A pattern is a name; `*.name` is every name below it, `.name` is it and every name below it, `*` any name at all.
    """

    def __init__(self, patterns: Iterable[str], own_names: Iterable[str] = ()) -> None:
        self.patterns = tuple(patterns)
        self.allows_all = "*" in self.patterns
        names: set[str] = set()
        suffixes = {".localhost", ".local"}
        for pattern in (*self.patterns, *own_names):
            name = pattern.lower().removesuffix(".")
            bare = name.removeprefix("*").removeprefix(".")
            if name.startswith(("*.", ".")):
                suffixes.add(f".{bare}")
            if not name.startswith("*"):
                names.add(bare)
        self._names = frozenset(names)
        self._suffixes = tuple(sorted(suffixes))

    def allows(self, authority: Authority) -> bool:
        host = authority.host
        is_local = authority.is_address or "." not in host or host.endswith(self._suffixes)
        return is_local or host in self._names or self.allows_all

    def check(self, authority: Authority | None, *, server: str, where: str) -> None:
        """Raises `Refused` for a name that is not answered to. where: the table of the configuration, for the log."""
        if authority is None or self.allows(authority):
            return
        name = authority.host
        raise Refused(
            "host",
            ApiError(
                "invalid_request",
                f"This {server} does not answer to the name `{name}`. If it is one of its names, its configuration has "
                f"to say so: {where}.allowed_hosts.",
                code=HOST_NOT_ALLOWED,
                status=421,
            ),
            advice=f"asked for by the name {name}, which is not answered to. If it is one of this {server}'s, put into "
            f"[{where}]: {setting('allowed_hosts', self.patterns, name)}",
        )


def host_pattern_faults(patterns: Iterable[str]) -> Iterator[str]:
    """What is wrong with each pattern of `allowed_hosts`."""
    for pattern in patterns:
        if pattern == "*":
            continue
        bare = pattern.removeprefix("*.") if pattern.startswith("*.") else pattern.removeprefix(".")
        authority = parse_authority(bare.encode("utf-8"))
        if authority is None:
            yield f"`{pattern}` is no name of a host, nor `*.name`, `.name` or `*` (other alphabets as `xn--…`)"
        elif authority.port is not None or bare.endswith(":"):
            yield f"`{pattern}`: a name is allowed with every port; leave the port out"


# ---------------------------------------------------------------------------------------------- pages


class OriginRules:
    """Origins of pages that may use a server beside its own: `scheme://host[:port]`, `scheme://*.host[:port]` for every
    name below a host, `scheme://*` for the schemes of applications, `null`, and `*` for every page."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self.patterns = tuple(patterns)
        self.allows_all = "*" in self.patterns
        self._allows_null = "null" in self.patterns
        self._origins: set[Origin] = set()
        self._below: list[Origin] = []
        self._schemes: set[str] = set()
        for pattern in self.patterns:
            scheme, _, rest = pattern.partition("://")
            if rest == "*":
                self._schemes.add(scheme.lower())
            elif rest.startswith("*.") and (origin := parse_origin(f"{scheme}://{rest[2:]}".encode())) is not None:
                self._below.append(origin._replace(host=f".{origin.host}"))
            elif (origin := parse_origin(pattern.encode())) is not None:
                self._origins.add(origin)

    def allows(self, page: bytes) -> bool:
        """page: an `Origin` header; one that is empty is not known, and not allowed."""
        if not page:
            return False
        if self.allows_all or page == b"null":
            return self.allows_all or self._allows_null
        origin = parse_origin(page)
        if origin is None:
            return False
        return (
            origin in self._origins
            or origin.scheme in self._schemes
            or any(
                origin.host.endswith(below.host) and (origin.scheme, origin.port) == (below.scheme, below.port)
                for below in self._below
            )
        )

    def refused(self, page: bytes, *, server: str, where: str | None, code: str = ORIGIN_NOT_ALLOWED) -> Refused:
        """where: the table of the configuration that could let the page in; None where nothing can."""
        who = f"a page of the origin {quoted(page)}" if page else "a page of another origin"
        may = (
            f"If it may, put into [{where}]: {setting('allow_origins', self.patterns, page.decode('latin-1'))}"
            if where is not None and page
            else "No setting opens this to pages of other origins"
        )
        return Refused(
            "origin",
            ApiError(
                "permission",
                f"This {server} does not answer to {who} here"
                + (f": {where}.allow_origins does not list it." if where is not None else "."),
                code=code,
            ),
            advice=f"refused to {who}. {may}",
        )


def origin_pattern_faults(patterns: Iterable[str]) -> Iterator[str]:
    """What is wrong with each pattern of `allow_origins`."""
    for pattern in patterns:
        scheme, separator, rest = pattern.partition("://")
        if pattern in ("*", "null") or (rest == "*" and _is_of_applications(scheme)):
            continue
        bare = rest.removeprefix("*.")
        if not separator or parse_origin(f"{scheme}://{bare}".encode()) is None:
            yield (
                f"`{pattern}` is no origin: `https://host`, `https://host:port`, `https://*.host`, "
                "`scheme://*` of an application, `null` or `*`, without anything behind it"
            )


def pattern_faults(allowed_hosts: Iterable[str], allow_origins: Iterable[str], *, where: str) -> list[str]:
    """What is wrong with the settings of a server. where: the table that they are in."""
    return [
        *(f"{where}.allowed_hosts: {fault}" for fault in host_pattern_faults(allowed_hosts)),
        *(f"{where}.allow_origins: {fault}" for fault in origin_pattern_faults(allow_origins)),
    ]


def _is_of_applications(scheme: str) -> bool:
    return scheme not in DEFAULT_PORTS and _SCHEME.fullmatch(scheme) is not None


def _malformed(what: str) -> Refused:
    return Refused(
        "host",
        ApiError("invalid_request", f"The `Host` header cannot be used: {what}.", code="invalid_host", status=400),
        advice=f"unusable `Host` header: {what}",
    )


def setting(key: str, present: Iterable[str], more: str) -> str:
    """The line of TOML that adds one value to a list."""
    return f"{key} = [{', '.join(json.dumps(value) for value in (*present, more))}]"

"""Names of this host: its hostname, and the names that stand beside it in its hosts file.

No name server is asked: it belongs to the network, and whoever has that would decide which names are ours.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from cortex_core.http_access import parse_authority

HOSTS_FILE = Path("/etc/hosts")


def own_names(listens_on: str) -> frozenset[str]:
    """Of this host, and the name that a server was told to listen on, if it is one: `name`, or `name:port`."""
    hosts = ""
    with suppress(OSError, UnicodeDecodeError):
        hosts = HOSTS_FILE.read_text(encoding="utf-8")
    return names_of_host(os.uname().nodename, hosts) | _names((listens_on,))


def names_of_host(hostname: str, hosts_file: str) -> frozenset[str]:
    """The hostname, its first label, and every name on a line of the hosts file that holds one of the two."""
    own = _names((hostname,))
    own |= {name.partition(".")[0] for name in own}
    found = set(own)
    for line in hosts_file.splitlines():
        names = _names(line.partition("#")[0].split()[1:])
        if names & own:
            found |= names
    return frozenset(found)


def _names(texts: tuple[str, ...] | list[str]) -> frozenset[str]:
    parsed = [parse_authority(text.encode("utf-8")) for text in texts]
    return frozenset(authority.host for authority in parsed if authority is not None and not authority.is_address)

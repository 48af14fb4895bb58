"""File descriptors: how many this process may have, and how many of them clients may take."""

from __future__ import annotations

import resource
from contextlib import suppress

MAX_CONNECTIONS = 16_384
"""The most that is taken for granted, however many descriptors there are: a connection costs some kilobytes, too."""
MIN_CONNECTIONS = 8
LIMITLESS = 2**20
"""What an infinite limit is taken for: Linux' own default for one process."""


def raise_descriptor_limit() -> None:
    """Raise the soft limit of this process, and of what it starts, to the hard one.

    Shells and units leave the soft one at 1,024 or less, for the sake of programs that use `select`; none of ours does.
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(OSError, ValueError):  # then what there is has to do
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def descriptor_limit() -> int:
    """How many descriptors this process may have now."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return LIMITLESS if soft == resource.RLIM_INFINITY else soft


def connection_limit(descriptors: int, *, reserve: int, descriptors_each: int, asked: int | None) -> int:
    """How many clients' connections fit.

    reserve: descriptors for everything else (files, stores, engines), at most a quarter of all. descriptors_each: what
    a connection may need at once, with the one that is opened for it. asked: what the configuration wants; no more
    than fits is given.
    """
    fits = max((descriptors - min(reserve, descriptors // 4)) // descriptors_each, MIN_CONNECTIONS)
    return min(fits, MAX_CONNECTIONS if asked is None else asked)

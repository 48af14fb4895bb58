"""Settings of the C library's allocator, for this process and for those it starts. Left alone where an operator has
settings or an allocator of their own: a mixture of both would be neither's.

glibc gives the end of its heap back to the kernel as soon as some hundred kilobytes of it are free, and gets it back, page
by page and zeroed, with the next request; which blocks it maps one by one depends on which were freed before.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def is_configured(environ: Mapping[str, str]) -> bool:
    """Whether a process that inherits `environ` has an allocator that somebody has chosen or set up."""
    is_set = any(name.startswith("MALLOC_") for name in environ)
    is_tuned = "glibc.malloc." in environ.get("GLIBC_TUNABLES", "")
    is_replaced = "malloc" in environ.get("LD_PRELOAD", "")
    return is_set or is_tuned or is_replaced


def configure(*, trim_bytes: int, map_bytes: int) -> bool:
    """Keep so much at the end of the heap; blocks of `map_bytes` and more are mapped and given back one by one.

    False where that cannot be said: other C libraries, or an allocator that is configured.
    """
    if is_configured(os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, trim_bytes) and mallopt(_M_MMAP_THRESHOLD, map_bytes))

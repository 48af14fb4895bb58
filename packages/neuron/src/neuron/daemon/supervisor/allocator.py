"""The C library's allocator in an engine process: its settings can only be given before the process begins.

Left alone, glibc keeps what a step has used: each thread has an arena of its own that is not trimmed while anything in
it lives, and every large block that is freed raises the size from which blocks are mapped (up to 32 MiB), so that the
next one of that size leaves a hole in the heap. An engine's blocks are few and large, and differ from step to step.
"""

from __future__ import annotations

from collections.abc import Mapping

_MIB = 2**20
SETTINGS = {
    "MALLOC_ARENA_MAX": "2",
    # Setting it also keeps it from rising. What is smaller is a step's own and reused by the next one.
    "MALLOC_MMAP_THRESHOLD_": str(4 * _MIB),
    # Without it the end of the heap would be given back and asked for again within each step.
    "MALLOC_TRIM_THRESHOLD_": str(64 * _MIB),
}


def allocator_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """`SETTINGS` for a process that inherits `environ`; none where the operator has settings or an allocator of their
    own there: a mixture of both would be neither's."""
    is_set = any(name.startswith("MALLOC_") for name in environ)
    is_tuned = "glibc.malloc." in environ.get("GLIBC_TUNABLES", "")
    is_replaced = "malloc" in environ.get("LD_PRELOAD", "")
    return {} if is_set or is_tuned or is_replaced else dict(SETTINGS)

"""Settings of the engine's allocator, and those of whoever has their own."""

from __future__ import annotations

import pytest
from neuron.daemon.supervisor.allocator import SETTINGS, allocator_environ


@pytest.mark.parametrize(
    "environ",
    [{}, {"LD_PRELOAD": "/usr/lib/libfoo.so"}, {"GLIBC_TUNABLES": "glibc.pthread.rseq=0"}, {"HOME": "MALLOC_"}],
)
def test_an_engine_gets_the_settings(environ: dict[str, str]) -> None:
    assert allocator_environ(environ) == SETTINGS


@pytest.mark.parametrize(
    "environ",
    [
        {"MALLOC_ARENA_MAX": "8"},
        {"MALLOC_CONF": "background_thread:true"},
        {"GLIBC_TUNABLES": "glibc.pthread.rseq=0:glibc.malloc.arena_max=1"},
        {"LD_PRELOAD": "/usr/lib/x86_64-linux-gnu/libjemalloc.so.2"},
        {"LD_PRELOAD": "/usr/lib/libfoo.so:/usr/lib/libtcmalloc_minimal.so.4"},
    ],
)
def test_nothing_is_mixed_with_what_an_operator_has_set(environ: dict[str, str]) -> None:
    assert allocator_environ(environ) == {}

"""What a host's processors are said to do well."""

from __future__ import annotations

from pathlib import Path

import pytest
from neuron.host_memory import multiplies_bfloat16

# Shortened, of a Sapphire Rapids, a Zen 4, a Zen 3 and a Graviton 3.
_FLAGS = "processor\t: 0\nflags\t\t: fpu sse4_2 avx2 {}\nbugs\t\t: avx512_bf16_is_no_bug\n"


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        (_FLAGS.format("avx512f avx512_bf16 amx_bf16 amx_tile"), True),
        (_FLAGS.format("avx512f avx512_bf16"), True),
        (_FLAGS.format("avx512f amx_bf16"), True),
        (_FLAGS.format("avx512f avx512_vnni"), False),
        (_FLAGS.format(""), False),
        ("processor\t: 0\nFeatures\t: fp asimd bf16 i8mm\n", False),
        ("", False),
    ],
)
def test_bfloat16_is_fast_where_the_processor_says_so(tmp_path: Path, cpuinfo: str, expected: bool) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(cpuinfo)
    assert multiplies_bfloat16(cpuinfo=path) is expected


def test_a_host_that_does_not_say_has_none(tmp_path: Path) -> None:
    assert multiplies_bfloat16(cpuinfo=tmp_path / "gone") is False

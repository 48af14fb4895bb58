from __future__ import annotations

import subprocess
import sys

import pytest
from cortex_core.serving.descriptors import MAX_CONNECTIONS, MIN_CONNECTIONS, connection_limit


@pytest.mark.parametrize(
    ("descriptors", "each", "asked", "limit"),
    [
        (256, 2, None, 96),
        (256, 1, None, 192),
        (1024, 2, None, 448),
        (20_000, 2, None, 9_936),
        (2**20, 2, None, MAX_CONNECTIONS),
        (256, 1, 50, 50),
        (256, 1, 5000, 192),
        (2**20, 2, 50_000, 50_000),
        (16, 2, None, MIN_CONNECTIONS),
    ],
)
def test_O2_the_bound_leaves_a_reserve_and_is_never_more_than_fits(
    descriptors: int, each: int, asked: int | None, limit: int
) -> None:
    assert connection_limit(descriptors, reserve=128, descriptors_each=each, asked=asked) == limit


def test_O2_the_soft_limit_is_raised_to_the_hard_one() -> None:
    """In a process of its own: a limit once lowered is lowered for good."""
    program = """
import resource
from cortex_core.serving.descriptors import descriptor_limit, raise_descriptor_limit
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 200))
assert descriptor_limit() == 100
raise_descriptor_limit()
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (200, 200) and descriptor_limit() == 200
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)

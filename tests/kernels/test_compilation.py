"""Every kernel compiles for real chips, with what its launcher passes; ptxas needs no GPU for that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
ROOM = {90: 227 * 1024, 80: 163 * 1024}  # shared memory that one block can have
CASES = (
    "attention qwen3",
    "norm 4096",
    "activation 12288",
    "rotary 128",
    "sampling 151936",
    "log totals 151936",
    "6144x4096",
)


@pytest.fixture(scope="module")
def variants() -> list[dict[str, Any]]:
    """One line per compiled variant. In a process of its own: here Triton interprets."""
    package = find_spec("triton")
    assert package is not None
    assert package.origin is not None
    if not (Path(package.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump").exists():
        pytest.skip("this Triton comes without NVIDIA's tools")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", f"{TESTS.name}.kernels.ahead_of_time", *map(str, ROOM), *CASES],
        cwd=TESTS.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("capability", ROOM)
def test_attention_compiles_to_tensor_core_code_that_fits(variants: list[dict[str, Any]], capability: int) -> None:
    attention = [
        variant
        for variant in variants
        if variant["kernel"] == "_attention_kernel" and variant["capability"] == capability
    ]
    assert len(attention) == 2  # decode and prefill
    for variant in attention:
        assert variant["tensor_cores"], variant
        assert variant["shared"] <= ROOM[capability], variant
        assert variant["stack"] <= 64, variant  # bytes of spilled registers per thread


@pytest.mark.slow
@pytest.mark.parametrize("capability", ROOM)
def test_products_stay_in_registers_and_share_a_multiprocessor(variants: list[dict[str, Any]], capability: int) -> None:
    """Two programs at a time, of either kind, keep a multiprocessor's share of the memory's latency covered."""
    found = [v for v in variants if v["kernel"] in ("tile_kernel", "vector_kernel") and v["capability"] == capability]
    assert len(found) >= 6
    for variant in found:
        assert variant["stack"] <= 64, variant
        assert 2 * variant["shared"] <= ROOM[capability], variant
        assert variant["tensor_cores"] == (variant["kernel"] == "tile_kernel"), variant


@pytest.mark.slow
@pytest.mark.parametrize("capability", ROOM)
def test_every_kernel_compiles(variants: list[dict[str, Any]], capability: int) -> None:
    compiled = {variant["kernel"]: variant for variant in variants if variant["capability"] == capability}
    assert compiled.keys() == {
        "_attention_kernel",
        "_kv_write_kernel",
        "_merge_kernel",
        "pick_kernel",
        "_plan_kernel",
        "_rms_norm_kernel",
        "_rotary_kernel",
        "scan_kernel",
        "_silu_mul_kernel",
        "log_total_kernel",
        "merge_linear_kernel",
        "tile_kernel",
        "vector_kernel",
    }
    assert all(variant["stack"] <= 256 for variant in compiled.values()), compiled

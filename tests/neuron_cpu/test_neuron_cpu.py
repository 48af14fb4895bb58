"""The native kernels of every instruction set that this processor has, without torch; and the distribution itself."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.native import needs_native_kernels

ROOT = Path(__file__).parents[2] / "packages" / "neuron-cpu"

PRODUCTS = """
import json, sys
import numpy as np
import neuron_cpu
rng = np.random.default_rng(0)
worst, differing = 0.0, 0
for threads in (1, 2):
    neuron_cpu.set_num_threads(threads)
    for rows, num_out, num_in in ((1, 64, 64), (3, 96, 70), (5, 32, 300), (17, 64, 129), (110, 64, 40)):
        weight = rng.standard_normal((num_out, num_in), dtype=np.float32)
        half = (weight.view(np.uint32) >> 16).astype(np.uint16)
        for kind, stored, exact in (
            (0, weight, weight),
            (1, half, (half.astype(np.uint32) << 16).view(np.float32)),
            (2, weight.astype(np.float16), weight.astype(np.float16).astype(np.float32)),
        ):
            panels = stored.copy()
            neuron_cpu.pack(kind, panels.ctypes.data, panels.ctypes.data, num_out // 32, num_in)
            x = rng.standard_normal((rows, num_in), dtype=np.float32)
            out = np.empty((rows, num_out), np.float32)
            def product(x, out):
                neuron_cpu.linear(0, kind, 0, x.ctypes.data, panels.ctypes.data, 0, out.ctypes.data, len(x), num_in,
                                  num_out, num_in, num_out, False, 0)
            product(x, out)
            worst = max(worst, float(np.abs(out - x.astype(np.float64) @ exact.T.astype(np.float64)).max()))
            last = np.empty((1, num_out), np.float32)
            product(x[-1:], last)
            differing += int((last != out[-1:]).sum())
print(json.dumps([neuron_cpu.instructions(), worst, differing]))
"""


@needs_native_kernels
@pytest.mark.parametrize("asked", ["base", "avx2", "avx512", ""])
def test_every_instruction_set_computes_the_same_products(asked: str) -> None:
    """More than a processor has may be asked for in vain. An output's bits do not depend on the number of rows."""
    environment = os.environ | {"NEURON_CPU_KERNELS": asked}
    done = subprocess.run([sys.executable, "-c", PRODUCTS], env=environment, capture_output=True, text=True, check=True)
    used, worst, differing = json.loads(done.stdout)
    assert used in {"base": {"base"}, "avx512": {"base", "avx2", "avx512"}}.get(asked, {"base", "avx2"})
    assert worst < 1e-4 and differing == 0


@needs_native_kernels
def test_a_child_of_fork_computes_alone() -> None:
    """Threads are not inherited: a child that waited for them would wait for ever."""
    code = """
import os, numpy as np, neuron_cpu
neuron_cpu.set_num_threads(3)
def product():
    weight, x, out = np.ones((2048, 256), np.float32), np.ones((4, 256), np.float32), np.empty((4, 2048), np.float32)
    neuron_cpu.linear(0, 0, 0, x.ctypes.data, weight.ctypes.data, 0, out.ctypes.data, 4, 256, 2048, 256, 2048, False, 0)
    assert (out == 256).all()
product()
child = os.fork()
if child == 0:
    assert neuron_cpu.num_threads() == 1
    product()
    neuron_cpu.set_num_threads(2)
    product()
    os._exit(7)
product()
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def build(kind: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys, build_backend; print(build_backend.build_{kind}(sys.argv[1]))"
    return subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_sdist_holds_what_a_wheel_is_built_from(tmp_path: Path) -> None:
    done = build("sdist", tmp_path)
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / done.stdout.strip()) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {f"csrc/{file.name}" for file in (ROOT / "csrc").iterdir()}
    assert sources | {"build_backend.py", "pyproject.toml", "PKG-INFO", "src/neuron_cpu/__init__.py"} <= names


def test_a_machine_without_a_compiler_is_told_so(tmp_path: Path) -> None:
    done = build("wheel", tmp_path, PATH=str(tmp_path), CXX="")
    assert "no C++ compiler: install g++ or clang++" in done.stderr
    done = build("editable", tmp_path, PATH=str(tmp_path), CXX="")
    assert "the native kernels are left out: no C++ compiler" in done.stderr, "a checkout goes on without them"
    with zipfile.ZipFile(tmp_path / done.stdout.strip()) as wheel:
        assert "_neuron_cpu.pth" in wheel.namelist() and "_neuron_cpu.abi3.so" not in wheel.namelist()
    (tmp_path / done.stdout.strip()).unlink()
    assert "cannot be run" in build("wheel", tmp_path, CXX="no-such-compiler").stderr
    assert not list(tmp_path.iterdir())


def test_a_wheel_holds_the_module_and_says_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands around the compiled module; the environment of these tests, and CI's wheels, have it compiled."""
    spec = importlib.util.spec_from_file_location("build_backend", ROOT / "build_backend.py")
    assert spec is not None and spec.loader is not None
    backend = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(backend)
    monkeypatch.setattr(backend, "compile_module", lambda target: target.write_bytes(b"compiled"))
    with zipfile.ZipFile(tmp_path / backend.build_wheel(str(tmp_path))) as wheel:
        names = wheel.namelist()
        info = next(name for name in names if name.endswith("/WHEEL"))
        assert "Tag: cp311-abi3-linux" in wheel.read(info).decode()
        record = wheel.read(info.replace("WHEEL", "RECORD")).decode()
        assert wheel.read("_neuron_cpu.abi3.so") == b"compiled"
    assert {"_neuron_cpu.abi3.so", "_neuron_cpu.pyi", "neuron_cpu/__init__.py", "neuron_cpu/py.typed"} <= set(names)
    assert all(f"{name}," in record for name in names)

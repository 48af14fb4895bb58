"""Build backend (PEP 517, PEP 660) of this distribution: compiles `csrc/` with the compiler that there is.

Needs Python's standard library and its C headers, and g++ or clang++ (or what `CXX` names). Every instruction set of
the architecture is compiled, whatever processor builds it; which one runs is decided when the module is loaded.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
MODULE = "_neuron_cpu.abi3.so"
PACKAGE = "neuron_cpu"
STUB = ROOT / "src" / "_neuron_cpu.pyi"

FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-fno-exceptions", "-fno-rtti", "-fvisibility=hidden", "-ffp-contract=fast",
    "-fno-math-errno", "-Wall", "-Wextra", "-Wno-psabi",
)  # fmt: skip
INSTRUCTIONS: Mapping[str, tuple[str, ...]] = {
    "kernels_avx2": ("-mavx2", "-mfma", "-mf16c"),
    "kernels_avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
}
"""Compiler flags of the sources that need more than every processor has; these are for x86-64 only."""

# A wheel's files have one time, so that the same sources give the same wheel (1980 is the first that zip knows).
_TIME = (1980, 1, 1, 0, 0, 0)


class BuildError(Exception):
    """What the compiler said."""


class NoCompiler(BuildError):
    """What is missing on this machine."""


# ------------------------------------------------------------------ the hooks


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return []


get_requires_for_build_sdist = get_requires_for_build_wheel
get_requires_for_build_editable = get_requires_for_build_wheel


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    package = {STUB.name: STUB.read_bytes()}
    package |= {
        f"{PACKAGE}/{file.name}": file.read_bytes()
        for file in sorted((ROOT / "src" / PACKAGE).iterdir())
        if file.is_file()
    }
    return _write_wheel(Path(wheel_directory), package)


def build_editable(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    """For a checkout, which goes on without the module on a machine that cannot compile it, and says so."""
    return _write_wheel(Path(wheel_directory), {f"_{PACKAGE}.pth": f"{ROOT / 'src'}\n".encode()}, is_needed=False)


def build_sdist(sdist_directory: str, config_settings: Any = None) -> str:
    stem = f"helexa_neuron_cpu-{_project()['version']}"
    path = Path(sdist_directory) / f"{stem}.tar.gz"
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as archive:
        for file in _sources():
            archive.add(file, f"{stem}/{file.relative_to(ROOT)}", filter=_anonymous)
        text = _metadata().encode()
        entry = tarfile.TarInfo(f"{stem}/PKG-INFO")
        entry.size = len(text)
        archive.addfile(entry, io.BytesIO(text))
    return path.name


# ------------------------------------------------------------------ compiling


def compile_module(target: Path) -> None:
    """Compile and link `csrc/` into `target`. Raises `BuildError`."""
    compiler = _compiler()
    include = sysconfig.get_paths()["include"]
    if not (Path(include) / "Python.h").exists():
        raise NoCompiler(f"{include} has no Python.h: install Python's C headers (python3-dev, python3-devel)")
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    sources = [file for file in sorted((ROOT / "csrc").glob("*.cpp")) if is_x86 or file.stem not in INSTRUCTIONS]
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(Path(scratch) / f"{source.stem}.o") for source in sources]
        commands = [
            [*compiler, *FLAGS, *INSTRUCTIONS.get(source.stem, ()), f"-I{include}", "-c", str(source), "-o", output]
            for source, output in zip(sources, objects, strict=True)
        ]
        list(pool.map(_run, commands))
        _run([*compiler, "-shared", "-static-libgcc", "-static-libstdc++", *objects, "-o", str(target), "-lpthread"])


def _compiler() -> list[str]:
    named = os.environ.get("CXX")
    if named:
        return shlex.split(named)
    for name in ("g++", "clang++", "c++"):
        found = shutil.which(name)
        if found:
            return [found]
    raise NoCompiler("no C++ compiler: install g++ or clang++, or name one in CXX")


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as exc:
        raise BuildError(f"{command[0]} cannot be run: {exc}") from exc
    if done.returncode != 0:
        raise BuildError(f"{shlex.join(command)}\n{done.stderr[-4000:]}")


# ------------------------------------------------------------------ archives


def _write_wheel(directory: Path, files: dict[str, bytes], *, is_needed: bool = True) -> str:
    version = _project()["version"]
    machine = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    tag = f"cp311-abi3-{machine}"
    with tempfile.TemporaryDirectory() as scratch:
        module = Path(scratch) / MODULE
        try:
            compile_module(module)
            files = {**files, MODULE: module.read_bytes()}
        except NoCompiler as exc:
            if is_needed:
                raise
            sys.stderr.write(f"the native kernels are left out: {exc}\n")
    info = f"helexa_neuron_cpu-{version}.dist-info"
    files[f"{info}/METADATA"] = _metadata().encode()
    files[f"{info}/WHEEL"] = f"Wheel-Version: 1.0\nGenerator: neuron-cpu\nRoot-Is-Purelib: false\nTag: {tag}\n".encode()
    files[f"{info}/licenses/LICENSE"] = (ROOT / "LICENSE").read_bytes()
    files[f"{info}/RECORD"] = _record(files.items(), f"{info}/RECORD")
    name = f"helexa_neuron_cpu-{version}-{tag}.whl"
    with zipfile.ZipFile(directory / name, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in files.items():
            entry = zipfile.ZipInfo(path, _TIME)
            entry.external_attr = (0o755 if path == MODULE else 0o644) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, content)
    return name


def _record(files: Iterable[tuple[str, bytes]], own: str) -> bytes:
    lines = []
    for path, content in files:
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        lines.append(f"{path},sha256={digest},{len(content)}\n")
    return "".join([*lines, f"{own},,\n"]).encode()


def _project() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        project: dict[str, Any] = tomllib.load(file)["project"]
    return project


def _metadata() -> str:
    project = _project()
    lines = [
        "Metadata-Version: 2.4",
        f"Name: {project['name']}",
        f"Version: {project['version']}",
        f"Summary: {project['description']}",
        f"License-Expression: {project['license']}",
        "License-File: LICENSE",
        f"Requires-Python: {project['requires-python']}",
        *(f"Author: {author['name']}" for author in project["authors"]),
        *(f"Classifier: {classifier}" for classifier in project["classifiers"]),
        "Description-Content-Type: text/markdown",
    ]
    return "\n".join(lines) + "\n\n" + (ROOT / "README.md").read_text(encoding="utf-8")


def _sources() -> list[Path]:
    kept = [ROOT / name for name in ("pyproject.toml", "build_backend.py", "README.md", "CHANGELOG.md", "LICENSE")]
    kept.append(STUB)
    for folder in ("csrc", f"src/{PACKAGE}"):
        kept += [file for file in sorted((ROOT / folder).iterdir()) if file.is_file()]
    return kept


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    entry.mtime = 0
    return entry

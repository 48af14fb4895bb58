"""Version and build of this package, found without importing any of it."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from cortex_core.fleet import LOAD_FEATURES, BuildInfo

_PACKAGE = "helexa-neuron"


@functools.cache
def read_build_info() -> BuildInfo:
    """Versions of the package, Python and torch; the git revision from `HELEXA_BUILD_SHA`, else from a checkout."""
    sha = os.environ.get("HELEXA_BUILD_SHA", "")[:7]
    is_dirty = False
    if not sha:
        sha, is_dirty = _git_state(Path(__file__).resolve().parent)
    return BuildInfo(
        package_version=_version(_PACKAGE) or "unknown",
        git_sha=sha or "unknown",
        git_dirty=is_dirty,
        python_version=platform.python_version(),
        torch_version=_version("torch"),
        features=(*(name for name in ("uvloop", "triton") if _version(name) is not None), *sorted(LOAD_FEATURES)),
    )


def version_line(build: BuildInfo) -> str:
    """The long form of `--version`."""
    dirty = "-dirty" if build.git_dirty else ""
    torch = f"torch {build.torch_version}" if build.torch_version else "torch is not installed"
    return f"neuron {build.package_version} ({build.git_sha}{dirty}) python {build.python_version}, {torch}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_state(folder: Path) -> tuple[str, bool]:
    """Short revision and whether the tree differs from it; empty unless `folder` is a tracked part of a checkout."""
    if "site-packages" in folder.parts:
        return "", False
    try:
        tracked = _git(folder, "ls-files", "--error-unmatch", Path(__file__).name)
        if not tracked:
            return "", False
        return _git(folder, "rev-parse", "--short=7", "HEAD"), bool(_git(folder, "status", "--porcelain", "-uno"))
    except (OSError, subprocess.SubprocessError):
        return "", False


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=5, check=True)
    return done.stdout.strip()

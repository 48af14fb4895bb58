"""The GPU path, measured against the device's limits and against `transformers`, in one run of at most eight minutes.

Run: python tests/bench/gpu.py [--json FILE] [--budget 470] [--models NAME ...] [--sections NAME ...] [--no-peer]
         [--no-graphs] [--no-overlap] [--engine FIELD=JSON ...] [--scratch DIR] [--sweep]
     python tests/bench/gpu.py --dry-run     # the whole flow on the CPU with tiny shapes, kernels in the interpreter

1. `ceilings`: a large copy and a large matrix product, measured here. All floors are computed from them.
2. `checks`: kernels against float64 references, and a checkpoint written by transformers against its logits. A failure
   ends the run with exit code 1 after the report.
3. `kernels`: device time (CUDA events around graph replays), the floor from bytes and operations, the fraction.
4. For Qwen3-0.6B and Qwen3-8B shapes on dummy weights: `engine`, decode at batch 1, 8, 32, 128, 256 and prompts of 1k
   and 8k through the engine as it serves; `offline`, 256 mixed requests through the same engine; `peer`, transformers'
   continuous batching on the same mix, and its `generate` with a static cache, which it compiles, and without.
5. `loading`: a checkpoint of the largest shapes from the page cache, and from the daemon's copy in memory.

Every section has a time of its own, and keeps what it has found when that is up or something breaks; `--json` is
written after each. At the end the bars (tests/bench/gpu_bars.py): ratios to the floor, so that they hold on any
device. To compare before and after, run it twice, with the switch of what has changed: `--no-graphs`, `--no-overlap`,
or any field of the engine's configuration (`--engine page_size=32`).

Runs from a checkout without installing it, on torch 2.11 and newer; beside torch and Triton it needs numpy, msgspec,
accelerate and safetensors, and transformers for the comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# A checkout need not be installed; `tests` must be ours and not one that some package left in site-packages.
sys.path[1:1] = [str(ROOT), *(str(ROOT / "packages" / name / "src") for name in ("neuron", "cortex-core"))]
if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read by Triton when it is imported
    from tests.kernels import interpreter

    interpreter.enable()

import gpu_bars  # noqa: E402
import gpu_kernels  # noqa: E402
import gpu_loading  # noqa: E402
import gpu_models  # noqa: E402
import torch  # noqa: E402
from gpu_engine import EngineUnderTest, engine_fields  # noqa: E402
from gpu_sections import Sections  # noqa: E402
from gpu_timing import Ceilings, Timer, measure_ceilings  # noqa: E402

FULL = gpu_models.Plan(
    decodes=((1, 640), (8, 640), (32, 640), (128, 640), (256, 640)), prompts=(1024, 8192), new_tokens=32,
    steps=40, rounds=3, num_requests=256, shortest=100, longest=1024,
)  # fmt: skip
DRY = gpu_models.Plan(
    decodes=((1, 40), (4, 40)), prompts=(48,), new_tokens=8,
    steps=4, rounds=1, num_requests=6, shortest=3, longest=12,
)  # fmt: skip
SECTIONS = ("ceilings", "checks", "kernels", "engine", "offline", "peer", "loading")
# Seconds that each may take; of a model, those of the larger one.
BUDGETS = {
    "ceilings": 20.0, "checks": 60.0, "kernels": 50.0, "engine": 60.0, "offline": 45.0,
    "continuous": 45.0, "eager": 25.0, "static": 60.0, "loading": 75.0,
}  # fmt: skip

Row = dict[str, Any]


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The checkout's commit, with a + if files differ from it; None outside a checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def environment(device: torch.device) -> dict[str, Any]:
    described: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit(),
        "device": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        **{name: installed(name) for name in ("torch", "triton", "transformers")},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described["device"] = properties.name
        described["memory_gib"] = round(properties.total_memory / 2**30, 1)
        described["multiprocessors"] = properties.multi_processor_count
    return described


def print_models(rows: list[Row]) -> None:
    columns = ("floor_ms", "engine_ms", "peer_eager_ms", "peer_static_ms")
    titles = ("floor", "engine", "transformers", "… static", "of floor", "to peer")
    print(f"\n{'milliseconds':<32}" + "".join(f"{title:>14}" for title in titles))
    for row in rows:
        cells = "".join(f"{row[name]:>14.3f}" if name in row else f"{'-':>14}" for name in columns)
        ratio = f"{row['ratio_to_peer']:>13.2f}x" if "ratio_to_peer" in row else f"{'-':>14}"
        title = f"{row['model']} {row['case']} {row['batch']} x {row['context']}"
        print(f"{title:<32}{cells}{row['fraction']:>14.1%}{ratio}")


def print_rates(report: dict[str, Any]) -> None:
    titles = ("floor", "engine", "continuous", "of floor", "to peer")
    print(f"\n{'output tokens per second':<32}" + "".join(f"{title:>14}" for title in titles))
    for row in report["offline"]:
        peer = f"{row['peer_tokens_per_s']:>14.0f}" if "peer_tokens_per_s" in row else f"{'-':>14}"
        ratio = f"{row['ratio_to_peer']:>13.2f}x" if "ratio_to_peer" in row else f"{'-':>14}"
        cells = f"{row['floor_tokens_per_s']:>14.0f}{row['tokens_per_s']:>14.0f}{peer}{row['fraction']:>14.1%}{ratio}"
        print(f"{row['model'] + ', ' + str(row['requests']) + ' requests':<32}{cells}")
    for row in report["loading"]:
        floor = f", {row['fraction']:.0%} of a copy from pinned memory" if "fraction" in row else ""
        print(f"{row['model']} {row['case']}: {row['bytes'] / 1e9:.2f} GB, {row['gb_per_s']:.2f} GB/s{floor}")


class Run:
    """One run: what is asked for, what has been found."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.started = time.perf_counter()
        self.is_dry = arguments.dry_run
        self.device = torch.device("cpu") if self.is_dry else torch.device("cuda", torch.cuda.current_device())
        self.dtype = torch.float32 if self.is_dry else torch.bfloat16
        self.timer = Timer(self.device, rounds=2 if self.is_dry else arguments.rounds)
        self.plan = DRY if self.is_dry else FULL
        self.has_peer = not arguments.no_peer and "peer" in arguments.sections and find_spec("transformers") is not None
        self.report: dict[str, Any] = {"dry_run": self.is_dry, **environment(self.device)}
        self.report |= {name: [] for name in ("ceilings", "checks", "kernels", "models", "offline", "peer", "loading")}
        self.fields = engine_fields(arguments.engine)
        if arguments.no_graphs:
            self.fields |= engine_fields(["cuda_graphs=false"])
        if arguments.no_overlap:
            self.fields |= engine_fields(["overlap=false"])
        self.report["engine"] = self.fields
        budget_s = arguments.budget or (3600.0 if self.is_dry else 470.0)
        self.sections = Sections(budget_s, note=self.note, on_end=self.write)

    def note(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.started:6.1f} s] {text}", flush=True)

    def write(self) -> None:
        self.report |= {
            "sections": self.sections.outcomes,
            "bars": gpu_bars.judge(self.report),
            "seconds": time.perf_counter() - self.started,
        }
        if self.arguments.json:
            self.arguments.json.write_text(json.dumps(self.report, indent=2) + "\n")

    def section(self, name: str, kind: str, rows: Iterator[Row], into: str) -> None:
        """kind: which of `BUDGETS`."""
        if self.arguments.sweep or "ceilings" in (name, into) or SECTION_OF.get(kind, kind) in self.arguments.sections:
            # An interpreter on a busy machine is no measurement: it is to come to its end.
            self.sections.run(name, BUDGETS[kind] * (20 if self.is_dry else 1), rows, self.report[into])
        gpu_models.free()

    # ------------------------------------------------------------------ what is measured

    def ceilings_rows(self) -> Iterator[Row]:
        with torch.inference_mode():
            found = measure_ceilings(self.timer, small=self.is_dry)
        self.note(f"copy {found.bytes_per_s / 1e12:.3f} TB/s, matrix product {found.flops_per_s / 1e12:.2f} TFLOP/s")
        yield {"bytes_per_s": found.bytes_per_s, "flops_per_s": found.flops_per_s}

    def check_rows(self) -> Iterator[Row]:
        with torch.inference_mode():
            checks = [
                *gpu_kernels.check_attention(self.device, small=self.is_dry),
                *gpu_kernels.check_small_operations(self.device, small=self.is_dry),
            ]
            for row in checks:
                yield self._checked(row)
            if self.has_peer:
                yield self._checked(gpu_models.check_against_peer(self.device, self.dtype, small=self.is_dry))

    def _checked(self, row: Row) -> Row:
        verdict = "ok  " if row["ok"] else "FAIL"
        self.note(f"{verdict} {row['check']}: {row['max_error']:.2e} (limit {row['limit']:.2e})")
        return row

    def kernel_rows(self, ceilings: Ceilings) -> Iterator[Row]:
        times = gpu_kernels.KernelTimes(self.timer, ceilings, small=self.is_dry)
        with torch.inference_mode():
            for row in times.sweep() if self.arguments.sweep else times.rows():
                if "error" in row:
                    self.note(f"{row['kernel']}: {row['error']}")
                else:
                    self.note(
                        f"{row['kernel']:<50}{row['us']:>10.1f} us, floor {row['floor_us']:>9.1f}, "
                        f"{row['fraction']:>6.1%}"
                    )
                yield row

    def model(self, name: str, config: dict[str, Any], ceilings: Ceilings) -> None:
        """All of one model; the engine is gone before the peer comes."""
        engines: list[EngineUnderTest] = []
        itemsize = self.dtype.itemsize
        models = [row for row in self.report["models"] if row["model"] == name]

        def engine(folder: Path) -> Iterator[Row]:
            longest = max(*self.plan.prompts, 256)
            limits = {"num_threads": 1, "kv_cache_tokens": 4096} if self.is_dry else {}
            engines.append(
                EngineUnderTest(config, folder, self.device, max_step_tokens=longest, **(limits | self.fields))
            )
            self.note(f"{name}: the engine was ready after {engines[0].ready_s:.1f} s")
            for row in gpu_models.measure_engine(name, config, engines[0], ceilings, self.plan, itemsize=itemsize):
                self.note(_words(row))
                models.append(row)
                yield row

        def offline() -> Iterator[Row]:
            for row in gpu_models.measure_offline(name, config, engines[0], ceilings, self.plan, itemsize=itemsize):
                self.note(_words(row))
                yield row

        with tempfile.TemporaryDirectory() as folder:
            self.section(f"engine {name}", "engine", engine(Path(folder)), "models")
            if engines:
                self.section(f"offline {name}", "offline", offline(), "offline")
                engines[0].close()
                engines.clear()
        gpu_models.free()
        if self.has_peer and models:
            self._peer(name, config, models)
        gpu_models.free()

    def _peer(self, name: str, config: dict[str, Any], models: list[Row]) -> None:
        peers: list[gpu_models.Peer] = []
        offline = [row for row in self.report["offline"] if row["model"] == name]

        def eager() -> Iterator[Row]:
            peers.append(gpu_models.Peer(config, self.device, self.dtype))
            yield from self._told(gpu_models.compare_static(models, peers[0], self.plan, self.timer, compiled=False))

        self.section(f"transformers {name}", "eager", eager(), "peer")
        if not peers:
            return
        if self.is_dry:
            # The compiler takes minutes on a CPU, and continuous batching takes all memory there is for its cache.
            self.note("transformers: no static cache and no continuous batching without a device")
            return
        self.section(
            f"transformers {name}, continuous batching", "continuous",
            self._told(gpu_models.compare_continuous(offline, peers[0], self.plan, config)), "peer",
        )  # fmt: skip
        self.section(
            f"transformers {name}, static cache", "static",
            self._told(gpu_models.compare_static(models, peers[0], self.plan, self.timer, compiled=True)), "peer",
        )  # fmt: skip

    def _told(self, rows: Iterator[Row]) -> Iterator[Row]:
        for row in rows:
            self.note("transformers: " + _words(row))
            yield row

    def all(self) -> None:
        self.section("ceilings", "ceilings", self.ceilings_rows(), "ceilings")
        if not self.report["ceilings"]:
            return  # without them there is no floor for anything
        ceilings = Ceilings(**self.report["ceilings"][0])
        self.section("checks", "checks", self.check_rows(), "checks")
        self.section("kernels", "kernels", self.kernel_rows(ceilings), "kernels")
        if self.arguments.sweep:
            return
        shapes = {name: gpu_models.SHAPES[name] for name in self.arguments.models}
        if self.is_dry:
            shapes = {"tiny": gpu_models.TINY}
        for name, config in shapes.items():
            if {"engine", "offline", "peer"} & set(self.arguments.sections):
                self.model(name, config, ceilings)
        name, config = list(shapes.items())[-1]
        rows = gpu_loading.measure_loading(
            name, config, self.device, self.dtype, scratch=self.arguments.scratch, rounds=1 if self.is_dry else 3
        )
        self.section(f"loading {name}", "loading", rows, "loading")


SECTION_OF = {"continuous": "peer", "eager": "peer", "static": "peer"}


def _words(row: Row) -> str:
    return ", ".join(f"{key} {value:.3f}" if isinstance(value, float) else str(value) for key, value in row.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--json", type=Path, help="write all figures to this file, after each section")
    parser.add_argument("--budget", type=float, help="seconds that all of it may take (470; no limit for a dry run)")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--models", nargs="*", default=list(gpu_models.SHAPES), choices=list(gpu_models.SHAPES))
    parser.add_argument("--sections", nargs="*", default=list(SECTIONS), choices=SECTIONS)
    parser.add_argument("--engine", nargs="*", default=[], metavar="FIELD=JSON", help="settings of the engine")
    parser.add_argument("--scratch", type=Path, help="where the checkpoint for loading is written")
    parser.add_argument("--sweep", action="store_true", help="only time attention with other tile shapes")
    parser.add_argument("--no-graphs", action="store_true", help="decode without CUDA graphs")
    parser.add_argument("--no-overlap", action="store_true", help="plan each step when the one before is done")
    parser.add_argument("--no-peer", action="store_true", help="do not run transformers")
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA device here; --dry-run runs the flow on the CPU")
    if arguments.dry_run:
        torch.set_num_threads(1)
    if arguments.sweep:
        arguments.sections = ["kernels"]
    torch.manual_seed(0)
    try:
        run = Run(arguments)
    except ValueError as error:
        parser.error(str(error))
    lists = ("ceilings", "checks", "kernels", "models", "offline", "peer", "loading")
    print("\n".join(f"{name}: {value}" for name, value in run.report.items() if name not in lists))
    run.all()
    report = run.report
    print_models(report["models"])
    print_rates(report)
    gpu_bars.print_bars(gpu_bars.judge(report))
    wrong = [row["check"] for row in report["checks"] if not row["ok"]]
    # A peer that cannot run here costs its column and nothing else.
    broken = [name for name in run.sections.failed if not name.startswith("transformers")]
    print(f"\n{time.perf_counter() - run.started:.0f} s; " + "; ".join(
        [*(f"FAILED: {check}" for check in wrong), *(f"BROKE OFF: {name}" for name in broken)] or ["all checks passed"]
    ))  # fmt: skip
    return 1 if wrong or broken else 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a thread of the peer may not want to end

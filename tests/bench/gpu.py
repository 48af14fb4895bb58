"""The GPU path, measured against the device's limits and against `transformers`, in one run of a few minutes.

Run: python tests/bench/gpu.py [--json FILE] [--budget 450] [--no-graphs] [--no-peer] [--models NAME ...] [--sweep]
     python tests/bench/gpu.py --dry-run     # the whole flow on the CPU with tiny shapes, kernels in the interpreter

1. Ceilings: a large copy and a large matrix product, measured here.
2. Kernels against float64 references, and a checkpoint written by transformers against its logits. A failure ends
   the run with exit code 1 after the report.
3. Kernels alone: device time (CUDA events around graph replays), the floor from bytes and operations, the fraction.
4. Qwen3-0.6B and Qwen3-8B shapes on dummy weights: decode at batch 1, 32, 256 and prompts of 1k and 8k, through the
   real model and runner (`runner`: as it serves today, host included) and as one CUDA graph with sampling (`graph`),
   beside transformers' eager `generate` and, while the time budget lasts, its compiled static-cache `generate`.

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
import time
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

import gpu_kernels  # noqa: E402
import gpu_models  # noqa: E402
import torch  # noqa: E402
from gpu_timing import Timer, measure_ceilings  # noqa: E402

FULL = gpu_models.Plan(decodes=((1, 640), (32, 640), (256, 640)), prompts=(1024, 8192), new_tokens=32)
DRY = gpu_models.Plan(decodes=((1, 40), (4, 40)), prompts=(48,), new_tokens=8)


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


def print_models(rows: list[dict[str, Any]]) -> None:
    columns = ("floor_ms", "graph_ms", "runner_ms", "peer_eager_ms", "peer_static_ms")
    titles = ("floor", "graph", "runner", "transformers", "… static", "of floor", "to peer")
    print(f"\n{'milliseconds':<28}" + "".join(f"{title:>14}" for title in titles))
    for row in rows:
        cells = "".join(f"{row[name]:>14.3f}" if name in row else f"{'-':>14}" for name in columns)
        ratio = f"{row['ratio_to_peer']:>13.2f}x" if "ratio_to_peer" in row else f"{'-':>14}"
        title = f"{row['model']} {row['case']} {row['batch']} x {row['context']}"
        print(f"{title:<28}{cells}{row['fraction']:>13.1%} {ratio}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--budget", type=float, default=450.0, help="seconds after which no compiled peer is started")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--models", nargs="*", default=list(gpu_models.SHAPES), choices=list(gpu_models.SHAPES))
    parser.add_argument("--sweep", action="store_true", help="only time attention with other tile shapes")
    parser.add_argument("--no-graphs", action="store_true", help="do not capture the decode step")
    parser.add_argument("--no-peer", action="store_true", help="do not run transformers")
    arguments = parser.parse_args()
    started = time.perf_counter()
    dry = arguments.dry_run
    if not dry and not torch.cuda.is_available():
        parser.error("no CUDA device here; --dry-run runs the flow on the CPU")
    if dry:
        torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device("cpu") if dry else torch.device("cuda", torch.cuda.current_device())
    dtype = torch.float32 if dry else torch.bfloat16
    timer = Timer(device, rounds=2 if dry else arguments.rounds)
    with_peer = not arguments.no_peer and find_spec("transformers") is not None

    def note(text: str) -> None:
        print(f"[{time.perf_counter() - started:6.1f} s] {text}", flush=True)

    report: dict[str, Any] = {"dry_run": dry, **environment(device), "skipped": []}
    print("\n".join(f"{name}: {value}" for name, value in report.items() if name != "skipped"))
    if not with_peer:
        report["skipped"].append("transformers (not installed or --no-peer)")

    with torch.inference_mode():
        ceilings = measure_ceilings(timer, small=dry)
        report["ceilings"] = {"bytes_per_s": ceilings.bytes_per_s, "flops_per_s": ceilings.flops_per_s}
        note(f"copy {ceilings.bytes_per_s / 1e12:.3f} TB/s, matrix product {ceilings.flops_per_s / 1e12:.2f} TFLOP/s")

        checks = [
            *gpu_kernels.check_attention(device, small=dry),
            *gpu_kernels.check_small_operations(device, small=dry),
        ]
        if with_peer:
            checks.append(gpu_models.check_against_peer(device, dtype, small=dry))
            gpu_models.free()
        report["checks"] = checks
        for row in checks:
            note(f"{'ok  ' if row['ok'] else 'FAIL'} {row['check']}: {row['max_error']:.2e} (limit {row['limit']:.2e})")

        report["kernels"] = []
        times = gpu_kernels.KernelTimes(timer, ceilings, small=dry)
        for row in times.sweep() if arguments.sweep else times.rows():
            report["kernels"].append(row)
            if "error" in row:
                note(f"{row['kernel']}: {row['error']}")
                continue
            note(f"{row['kernel']:<44}{row['us']:>10.1f} us, floor {row['floor_us']:>9.1f}, {row['fraction']:>6.1%}")
        gpu_models.free()

    shapes = {"tiny": gpu_models.TINY} if dry else {name: gpu_models.SHAPES[name] for name in arguments.models}
    if arguments.sweep:
        shapes = {}
    plan = DRY if dry else FULL
    rows: list[dict[str, Any]] = []
    for name, config in shapes.items():
        own, peer = gpu_models.measure(
            name, config, timer, ceilings, plan, dtype,
            with_graphs=not arguments.no_graphs, with_peer=with_peer, note=note,
        )  # fmt: skip
        rows += own
        for row in own:
            if peer is None or row["case"] != "decode":
                continue
            label = f"{name} static-cache generate at batch {row['batch']}"
            if time.perf_counter() - started > arguments.budget * len(rows) / (len(shapes) * len(own)):
                report["skipped"].append(f"{label}: time budget")
                continue
            try:
                seconds = peer.decode_seconds(
                    batch=row["batch"], context=row["context"], new_tokens=plan.new_tokens, static=True
                )
                row["peer_static_ms"] = seconds * 1e3
                note(f"{label}: {seconds * 1e3:.3f} ms")
            except Exception as error:  # a peer that cannot run here must not cost our figures
                report["skipped"].append(f"{label}: {type(error).__name__}: {str(error)[:200]}")
        del peer
        gpu_models.free()
    for row in rows:
        best = min(row[key] for key in ("graph_ms", "runner_ms") if key in row)
        row["fraction"] = row["floor_ms"] / best
        peers = [row[key] for key in ("peer_eager_ms", "peer_static_ms") if key in row]
        if peers:
            row["ratio_to_peer"] = min(peers) / best
    report["models"] = rows
    report["seconds"] = time.perf_counter() - started
    if rows:
        print_models(rows)
    for skipped in report["skipped"]:
        print(f"skipped: {skipped}")
    failed = [row["check"] for row in checks if not row["ok"]]
    print(f"{report['seconds']:.0f} s; " + (f"FAILED: {', '.join(failed)}" if failed else "all checks passed"))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

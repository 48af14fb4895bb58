"""Compile every kernel launch for a GPU that need not be there, with the arguments of the real launchers.

`python -m tests.kernels.ahead_of_time 90 80` replaces Triton's launch by a compilation for the given compute
capabilities, calls the launchers with CPU tensors of real model shapes, and prints one JSON line per compiled
variant: registers, spilled bytes, shared memory. ptxas comes with Triton, so no CUDA installation is needed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

_TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip
_OPTIONS = ("num_warps", "num_stages")


class Recorder:
    """Stands in for `JITFunction.run`: compiles the launch for `targets` and runs nothing."""

    def __init__(self, targets: list[int]) -> None:
        self.targets = targets
        self.results: list[dict[str, Any]] = []
        self.label = ""
        self._seen: set[str] = set()

    def run(self, function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        values = dict(zip(function.arg_names, args, strict=False)) | kwargs
        signature: dict[str, str] = {}
        constexprs: dict[tuple[int, ...], Any] = {}
        attributes: dict[tuple[int, ...], Any] = {}
        for index, parameter in enumerate(function.params):
            value = values[parameter.name]
            if parameter.is_constexpr or value is None:
                signature[parameter.name] = "constexpr"
                constexprs[(index,)] = value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = "*" + _TYPES[value.dtype]
                if not parameter.do_not_specialize_on_alignment:
                    attributes[(index,)] = [["tt.divisibility", 16]]
            elif isinstance(value, bool):
                signature[parameter.name] = "i1"
            elif isinstance(value, int):
                if value == 1 and not parameter.do_not_specialize:
                    signature[parameter.name] = "constexpr"
                    constexprs[(index,)] = 1
                else:
                    signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                    if value % 16 == 0 and not parameter.do_not_specialize:
                        attributes[(index,)] = [["tt.divisibility", 16]]
            else:
                signature[parameter.name] = "fp32"
        key = repr((function.__name__, signature, constexprs, attributes, options))
        if key in self._seen:
            return
        self._seen.add(key)
        for capability in self.targets:
            source = ASTSource(function, signature, constexprs, attributes)
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            self.results.append(
                {
                    "kernel": function.__name__,
                    "case": self.label,
                    "capability": capability,
                    "shared": compiled.metadata.shared,
                    "tensor_cores": bool(re.search(r"wgmma|mma\.sync", compiled.asm["ptx"])),
                    **_resources(compiled.asm["cubin"]),
                }
            )


def _resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return {"registers": int(found[1]), "stack": int(found[2])}


def attention_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    from neuron.engine.attention.attention_triton import TritonAttention

    from tests.kernels.cases import AttentionCase

    def launch(case: AttentionCase, window: int | None = None) -> None:
        backend = TritonAttention()
        backend.prepare(case.batch)
        backend.forward(case.q, case.k, case.v, case.kv, case.batch, scale=case.scale, sliding_window=window)

    step = [(1, 40), (40, 300), (300, 300)]
    shapes = [
        ("qwen3", torch.bfloat16, 128, 2, None),
        ("llama3", torch.bfloat16, 128, 4, None),
        ("mistral", torch.float16, 128, 4, 4096),
        ("small heads", torch.bfloat16, 80, 7, None),
        ("head 256", torch.bfloat16, 256, 4, None),
        ("fp32", torch.float32, 128, 2, None),
    ]
    for label, dtype, head_dim, group, window in shapes:
        case = AttentionCase(step, num_decodes=1, head_dim=head_dim, group=group, dtype=dtype, num_kv_heads=2)
        yield f"attention {label}", lambda case=case, window=window: launch(case, window)  # type: ignore[misc]


def small_operation_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    from neuron.engine.kernels.activation import silu_mul
    from neuron.engine.kernels.attention.rotary import rotate_and_write
    from neuron.engine.kernels.norm import add_rms_norm, rms_norm

    for hidden, intermediate in ((1024, 3072), (4096, 12288)):
        x = torch.zeros(3, hidden, dtype=torch.bfloat16)
        gate_up = torch.zeros(3, 2 * intermediate, dtype=torch.bfloat16)
        yield f"norm {hidden}", lambda x=x: rms_norm(x, x[0], 1e-6)  # type: ignore[misc]
        yield f"norm {hidden}", lambda x=x: add_rms_norm(x, x, x[0], 1e-6)  # type: ignore[misc]
        yield f"activation {intermediate}", lambda gate_up=gate_up: silu_mul(gate_up)  # type: ignore[misc]
    heads = {"num_heads": 32, "num_kv_heads": 8}
    for head_dim, rotary_dim, norm in ((128, 128, True), (80, 80, False), (256, 64, True)):
        qkv = torch.zeros(3, 48 * head_dim, dtype=torch.bfloat16)
        kv = torch.zeros(2, 2, 16, 8, head_dim, dtype=torch.bfloat16)
        index = torch.zeros(3, dtype=torch.int64)
        table = torch.zeros(8, rotary_dim)
        weight = qkv[0, :head_dim] if norm else None
        yield (
            f"rotary {head_dim}",
            lambda qkv=qkv, kv=kv, index=index, table=table, weight=weight, head_dim=head_dim: rotate_and_write(  # type: ignore[misc]
                qkv, index, table, kv, index, head_dim=head_dim, q_weight=weight, k_weight=weight, eps=1e-6, **heads
            ),
        )


def sampling_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    from neuron.engine.kernels.sampling.logsumexp import log_totals
    from neuron.engine.kernels.sampling.sampling import sample
    from neuron.engine.kernels.sampling.sampling_inputs import TokenMasks, TokenPenalties

    rows = 2
    zeros = torch.zeros(rows)
    counts = torch.zeros(rows + 1, dtype=torch.int32)
    penalties = TokenPenalties(counts, zeros.long(), zeros, zeros.int(), torch.zeros(rows, 3), zeros.long())
    for vocab_size in (4096, 151936, 262144):
        logits = torch.zeros(rows, vocab_size)
        yield (
            f"sampling {vocab_size}",
            lambda logits=logits: sample(logits, zeros, zeros.int(), zeros, zeros, zeros.long()),  # type: ignore[misc]
        )
        yield f"log totals {vocab_size}", lambda logits=logits: log_totals(logits)  # type: ignore[misc]
        masks = TokenMasks(torch.zeros(rows, -(-vocab_size // 32), dtype=torch.int32), zeros.int())
        yield (
            f"constrained sampling {vocab_size}",
            lambda logits=logits, masks=masks: sample(  # type: ignore[misc]
                logits, zeros, zeros.int(), zeros, zeros, zeros.long(), penalties=penalties, masks=masks
            ),
        )


def linear_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """The products of Qwen3-8B's and 0.6B's layers; launchers are told that the chip is a H200."""
    from neuron.engine.kernels.attention.tiling import Chip
    from neuron.engine.kernels.gemm import gemm, gemv

    def chip_of(_: torch.device) -> Chip:
        return Chip(num_multiprocessors=132, shared_memory=227 * 1024)

    gemm.chip_of = gemv.chip_of = chip_of
    for dtype, num_out, k in (
        (torch.bfloat16, 6144, 4096),
        (torch.bfloat16, 4096, 12288),
        (torch.bfloat16, 1024, 3072),
        (torch.float32, 1024, 1024),
    ):
        weight = torch.empty(num_out, k, dtype=dtype)
        name = f"{num_out}x{k} {str(dtype).removeprefix('torch.')}"
        for rows in (1, 2, 4):
            x = torch.empty(rows, k, dtype=dtype)
            yield f"vector {rows} {name}", lambda x=x, weight=weight: gemv.vector_linear(x, weight)  # type: ignore[misc]
        x = torch.empty(16, k, dtype=dtype)
        yield f"vector gated {name}", lambda x=x[:1], weight=weight: gemv.vector_linear(x, weight, gated=True)  # type: ignore[misc]
        yield f"split {name}", lambda x=x, weight=weight: gemm.split_linear(x, weight)  # type: ignore[misc]
        yield f"split gated {name}", lambda x=x, weight=weight: gemm.split_linear(x, weight, gated=True)  # type: ignore[misc]
        many = torch.empty(512, k, dtype=dtype)
        yield f"invariant {name}", lambda x=x, weight=weight: gemm.invariant_linear(x, weight)  # type: ignore[misc]
        yield f"invariant whole {name}", lambda x=many, weight=weight: gemm.invariant_linear(x, weight)  # type: ignore[misc]


def all_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    yield from attention_cases()
    yield from small_operation_cases()
    yield from sampling_cases()
    yield from linear_cases()


def main(arguments: list[str]) -> None:
    recorder = Recorder([int(argument) for argument in arguments if argument.isdigit()])
    only = [argument for argument in arguments if not argument.isdigit()]
    JITFunction.run = lambda self, *args, **kwargs: recorder.run(self, *args, **kwargs)  # type: ignore[method-assign]
    for label, launch in all_cases():
        if only and not any(part in label for part in only):
            continue
        recorder.label = label
        launch()
    for result in recorder.results:
        print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])

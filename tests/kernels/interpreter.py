"""Triton's interpreter made fit for our tests: switched on whoever imported Triton first, and exact in bfloat16.

Triton reads TRITON_INTERPRET when a function is decorated, so its own library (`tl.sum`, `tl.zeros`, …) must be
decorated under it too. Its interpreter keeps bfloat16 as raw 16-bit integers: it rounds towards zero and multiplies
the integers in `tl.dot`, where a GPU rounds to nearest even and multiplies the numbers. Both are put right here.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

_LIBRARY = ("core", "standard", "math", "random", "semantic")


def enable() -> None:
    """Import (or import again) Triton's library and our kernels so that they run in the interpreter.

    The environment is left as it was; kernels must be called with TRITON_INTERPRET=1 set (`tl` asks again then).
    """
    import neuron.engine.kernels

    imported_before = "triton" in sys.modules
    stale = [name for name in sys.modules if name.startswith("neuron.engine.kernels.") or name.endswith("_triton")]
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        if imported_before:
            _decorate_library_again()
            for name in stale:
                del sys.modules[name]
        for info in pkgutil.walk_packages(neuron.engine.kernels.__path__, "neuron.engine.kernels."):
            importlib.import_module(info.name)
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
    _correct_bfloat16()
    _correct_index()
    _patch_once_per_launch()


def _decorate_library_again() -> None:
    import triton
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    replaced: dict[int, object] = {}
    library = [importlib.import_module(f"triton.language.{name}") for name in _LIBRARY]
    for module in (triton, tl, *library):
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                setattr(module, name, replaced.setdefault(id(value), InterpretedFunction(value.fn)))


def _to_float32(bits: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    bits = np.ascontiguousarray(values).view(np.uint32)
    nearest_even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, nearest_even).astype(np.uint16).reshape(np.shape(values))


def _correct_bfloat16() -> None:
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    if getattr(InterpreterBuilder, "_exact_bfloat16", False):
        return
    builder: Any = InterpreterBuilder
    original_cast, original_convert, original_dot = builder.cast_impl, builder.create_fp_to_fp, builder.create_dot

    def convert(src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16 and target == tl.float32:
            return TensorHandle(_to_float32(src.data), target)
        if source == tl.float32 and target == tl.bfloat16:
            return TensorHandle(_to_bfloat16(src.data), target)
        return None

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        converted = convert(src, dst_type)  # a handle's truth value is that of its data
        return original_cast(self, src, dst_type) if converted is None else converted

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        converted = convert(src, dst_type)
        return original_convert(self, src, dst_type, rounding_mode) if converted is None else converted

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a = TensorHandle(_to_float32(a.data), tl.float32)
        if b.dtype.scalar == tl.bfloat16:
            b = TensorHandle(_to_float32(b.data), tl.float32)
        return original_dot(self, a, b, d, *options)

    builder.cast_impl = cast_impl
    builder.create_fp_to_fp = create_fp_to_fp
    builder.create_dot = create_dot
    # `create_fp_ext` and its like call `self.cast_impl`, so they follow.
    builder._exact_bfloat16 = True


@contextmanager
def ordered_dot() -> Iterator[None]:
    """`tl.dot` that adds its products one after the other, as every element of a tensor core's result is made alike.

    numpy's product is BLAS's, which treats elements at a tile's border otherwise than those within: the last bits then
    depend on an element's place, which no GPU does. Slow; for tests of what must not depend on the place.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    builder: Any = InterpreterBuilder
    original = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        left, right = (
            _to_float32(part.data) if part.data.dtype == np.uint16 else part.data.astype(np.float32) for part in (a, b)
        )
        total = np.array(d.data, dtype=np.float32)
        for k in range(left.shape[1]):
            total += left[:, k : k + 1] * right[k : k + 1]
        return TensorHandle(total, d.dtype.scalar)

    builder.create_dot = create_dot
    try:
        yield
    finally:
        builder.create_dot = original


def _correct_index() -> None:
    """Triton 3.6 turns a loop bound into a Python integer with `int(array of one element)`, which numpy now refuses."""
    import triton
    from triton.runtime import interpreter as triton_interpreter

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 7):
        return
    original = triton_interpreter._patch_lang_tensor

    def patch(tensor: Any, *scope: Any) -> None:
        original(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    triton_interpreter._patch_lang_tensor = patch


def _patch_once_per_launch() -> None:
    """The interpreter patches `triton.language` again at every call of a device function: a third of its time."""
    import triton.language as tl
    from triton.runtime import interpreter as triton_interpreter

    original = triton_interpreter._patch_lang
    if getattr(original, "_once_per_launch", False):
        return
    patched: set[int] = set()

    class Nothing:
        def restore(self) -> None: ...

    def patch(function: Any) -> Any:
        modules = {id(value) for value in function.__globals__.values() if value is tl or value is tl.core}
        if modules <= patched:
            return Nothing()
        outermost = not patched
        patched.update(modules)
        scope = original(function)
        restore = scope.restore

        def restore_all() -> None:
            if outermost:
                patched.clear()
            restore()

        scope.restore = restore_all
        return scope

    patch._once_per_launch = True  # type: ignore[attr-defined]
    triton_interpreter._patch_lang = patch

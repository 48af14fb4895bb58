"""Notices kernels that are compiled when everything should have been: in steady state a compile stalls every stream."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

logger = logging.getLogger(__name__)


class CompileWatch:
    """Counts Triton's compilations of this process after `arm`, and logs each as the defect it is.

    One that is found in Triton's cache on disk counts too: loading it takes milliseconds and was to be done before.
    """

    def __init__(self) -> None:
        self.num_late = 0
        self._is_armed = False
        self._is_installed = False

    def arm(self) -> None:
        """Warming up is over."""
        self._is_installed = self._is_installed or self._install()
        self._is_armed = True

    @contextmanager
    def expected(self) -> Iterator[None]:
        """What is compiled within is no defect (a CUDA graph is being recorded)."""
        was_armed, self._is_armed = self._is_armed, False
        try:
            yield
        finally:
            self._is_armed = was_armed

    def saw(self, name: str) -> None:
        """A kernel was compiled."""
        if self._is_armed:
            self.num_late += 1
            logger.warning("the kernel %s was compiled after warming up, while requests waited: a defect", name)

    def _install(self) -> bool:
        if find_spec("triton") is None:
            return True
        import triton

        def hook(*arguments: Any, **details: Any) -> None:
            self.saw(_name_of(arguments, details))

        knobs = getattr(triton, "knobs", None)
        if knobs is not None and hasattr(knobs.runtime, "jit_post_compile_hook"):  # Triton 3.4 and up
            knobs.runtime.jit_post_compile_hook = _after(knobs.runtime.jit_post_compile_hook, hook)
            return True
        from triton.runtime.jit import JITFunction

        for attribute in ("compiled_hook", "cache_hook"):
            if hasattr(JITFunction, attribute):
                setattr(JITFunction, attribute, staticmethod(_after(getattr(JITFunction, attribute), hook)))
                return True
        logger.info("this version of Triton does not say when it compiles")
        return True


def _after(first: Callable[..., Any] | None, second: Callable[..., Any]) -> Callable[..., Any]:
    """Both, with the result of the first: a cache hook's decides whether there is anything to compile."""

    def both(*arguments: Any, **details: Any) -> Any:
        result = None if first is None else first(*arguments, **details)
        second(*arguments, **details)
        return result

    return both


def _name_of(arguments: tuple[Any, ...], details: dict[str, Any]) -> str:
    function = details.get("fn")
    name = getattr(function, "name", None) or getattr(function, "__name__", None)
    return str(name or details.get("repr") or (arguments[0] if arguments else "of unknown name"))

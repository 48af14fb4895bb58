"""Other libraries' attention for prompt chunks over our pages: used where installed, able, right and faster than ours.

Nothing here is a dependency. A plug-in is imported only when a start looks for one (`attention_choice`), tried on a
small problem against our kernel, and timed beside it. Decodes always take our kernel, whose plan lives on the device,
so that CUDA graphs replay it while contexts grow.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from neuron.engine.attention.interface import StepBatch

_FLASHINFER_WORKSPACE_BYTES = 128 * 2**20


class PluginUnavailable(Exception):
    """The library is not here, or cannot do this; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class PromptChunks:
    """The prompt chunks of a step, counted from the first of them.

    query_start: [S + 1] int32, from 0; context_lens: [S] int32; page_tables: [S, n] int32. The others are known to the
    host.
    """

    query_start: Tensor
    context_lens: Tensor
    page_tables: Tensor
    max_query_len: int
    max_context_len: int

    @classmethod
    def of(cls, batch: StepBatch) -> PromptChunks:
        """Those of a batch that has some: they come behind its decodes, of one token each."""
        first = batch.num_decodes
        return cls(
            query_start=batch.query_start[first:] - first,
            context_lens=batch.context_lens[first:],
            page_tables=batch.page_tables[first:],
            max_query_len=max(batch.query_lens_host[first:]),
            max_context_len=max(batch.context_lens_host[first:]),
        )


class PrefillPlugin(Protocol):
    """Causal attention of prompt chunks over paged keys and values."""

    @property
    def name(self) -> str: ...

    def prepare(self) -> None:
        """Forget the last step."""
        ...

    def attend(
        self, q: Tensor, kv_layer: Tensor, chunks: PromptChunks, *, scale: float, sliding_window: int | None
    ) -> Tensor:
        """q: [T, Hq, D], contiguous; kv_layer: [num_pages, 2, page_size, Hkv, D]. Query tokens are the last of their
        context. A window counts the query's own position. Returns [T, Hq, D]."""
        ...


def _left(sliding_window: int | None) -> int:
    """Positions before its own that a query sees, -1 for all."""
    return -1 if sliding_window is None else sliding_window - 1


class TorchVarlen:
    """`torch.nn.attention.varlen` with a block table: torch 2.13 and newer, and there where its kernel accepts one."""

    name = "torch varlen"

    def __init__(self) -> None:
        if find_spec("torch.nn.attention.varlen") is None:
            raise PluginUnavailable(f"torch {torch.__version__} has no varlen attention")
        self._varlen: Callable[..., Any] = import_module("torch.nn.attention.varlen").varlen_attn
        if "block_table" not in inspect.signature(self._varlen).parameters:
            raise PluginUnavailable(f"varlen attention of torch {torch.__version__} takes no block table")

    def prepare(self) -> None:
        pass

    def attend(
        self, q: Tensor, kv_layer: Tensor, chunks: PromptChunks, *, scale: float, sliding_window: int | None
    ) -> Tensor:
        keys, values = kv_layer.unbind(1)
        out: Tensor = self._varlen(
            q, keys, values, chunks.query_start, None, chunks.max_query_len, chunks.max_context_len,
            scale=scale, window_size=(_left(sliding_window), 0), enable_gqa=q.shape[1] != keys.shape[2],
            seqused_k=chunks.context_lens, block_table=chunks.page_tables,
        )  # fmt: skip
        return out


class FlashAttention3:
    """FlashAttention-3, from its own package or from SGLang's."""

    name = "flash attention 3"

    def __init__(self) -> None:
        if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9:
            raise PluginUnavailable("made for compute capability 9.0; elsewhere a failed launch ends the process")
        failed: list[str] = []
        for module in ("flash_attn_interface", "sgl_kernel.flash_attn"):
            if find_spec(module.partition(".")[0]) is not None:
                try:
                    self._attend: Callable[..., Any] = import_module(module).flash_attn_with_kvcache
                    return
                except Exception as exc:  # built for another torch, for one
                    failed.append(f"{module} is installed but does not load: {exc}")
        raise PluginUnavailable("; ".join(failed) or "neither flash_attn_interface nor sgl_kernel is installed")

    def prepare(self) -> None:
        pass

    def attend(
        self, q: Tensor, kv_layer: Tensor, chunks: PromptChunks, *, scale: float, sliding_window: int | None
    ) -> Tensor:
        keys, values = kv_layer.unbind(1)
        out: Tensor = self._attend(
            q, keys, values, cache_seqlens=chunks.context_lens, page_table=chunks.page_tables,
            cu_seqlens_q=chunks.query_start, max_seqlen_q=chunks.max_query_len, softmax_scale=scale, causal=True,
            window_size=(_left(sliding_window), -1 if sliding_window is None else 0),
        )  # fmt: skip
        return out


class FlashInfer:
    """FlashInfer's paged prefill; our pages are its NHD layout. A plan is made once per step and window."""

    name = "flashinfer"

    def __init__(self) -> None:
        if find_spec("flashinfer") is None:
            raise PluginUnavailable("flashinfer is not installed")
        self._wrapper_type: Callable[..., Any] = import_module("flashinfer").BatchPrefillWithPagedKVCacheWrapper
        self._wrappers: dict[int, Any] = {}
        self._planned: set[int] = set()

    def prepare(self) -> None:
        self._planned.clear()

    def attend(
        self, q: Tensor, kv_layer: Tensor, chunks: PromptChunks, *, scale: float, sliding_window: int | None
    ) -> Tensor:
        left = _left(sliding_window)
        wrapper = self._wrappers.get(left)
        if wrapper is None:
            workspace = torch.empty(_FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
            wrapper = self._wrappers[left] = self._wrapper_type(workspace, "NHD")
        if left not in self._planned:
            indptr, indices, last = page_lists(chunks.page_tables, chunks.context_lens, kv_layer.shape[2])
            wrapper.plan(
                chunks.query_start, indptr, indices, last, q.shape[1], kv_layer.shape[3], q.shape[2], kv_layer.shape[2],
                causal=True, sm_scale=scale, window_left=left, q_data_type=q.dtype, kv_data_type=kv_layer.dtype,
            )  # fmt: skip
            self._planned.add(left)
        out: Tensor = wrapper.run(q, kv_layer)
        return out


def page_lists(page_tables: Tensor, context_lens: Tensor, page_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tables as FlashInfer has them: ([S + 1] where each sequence's pages begin, pages, tokens on each last page)."""
    counts = (context_lens + page_size - 1) // page_size
    column = torch.arange(page_tables.shape[1], device=page_tables.device)
    indices = page_tables[column[None] < counts[:, None]]
    indptr = torch.zeros(counts.shape[0] + 1, dtype=torch.int32, device=page_tables.device)
    indptr[1:] = counts.cumsum(0)
    return indptr, indices, (context_lens - (counts - 1) * page_size).to(torch.int32)


PLUGINS: Mapping[str, Callable[[], PrefillPlugin]] = {
    plugin.name: plugin for plugin in (TorchVarlen, FlashAttention3, FlashInfer)
}


def installed_plugins(note: Callable[[str, str], None]) -> Iterator[PrefillPlugin]:
    """Those whose library is here; `note` is told (name, reason) of the others."""
    for name, make in PLUGINS.items():
        try:
            yield make()
        except PluginUnavailable as exc:
            note(name, str(exc))
        except Exception as exc:  # an import may raise anything, and none of these libraries is needed
            note(name, f"is installed but does not load: {exc!r}")

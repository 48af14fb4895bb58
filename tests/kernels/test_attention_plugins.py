"""Other libraries' attention for prompt chunks: the seam, the choice, and each library where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from neuron.engine.attention.attention_choice import HeadShape, _problem, pick
from neuron.engine.attention.attention_plugins import (
    PLUGINS,
    PluginUnavailable,
    PrefillPlugin,
    PromptChunks,
    installed_plugins,
    page_lists,
)
from neuron.engine.attention.attention_triton import TritonAttention
from torch import Tensor

from tests.kernels.cases import AttentionCase


class PlainTorch:
    """A plug-in of a few lines, as a library would be: it sees chunks only, counted from 0."""

    name = "plain torch"

    def __init__(self, *, factor: float = 1.0, fault: Exception | None = None) -> None:
        self.factor = factor
        self.fault = fault
        self.steps = 0
        self.calls = 0

    def prepare(self) -> None:
        self.steps += 1

    def attend(
        self, q: Tensor, kv_layer: Tensor, given: PromptChunks, *, scale: float, sliding_window: int | None
    ) -> Tensor:
        self.calls += 1
        if self.fault is not None:
            raise self.fault
        group = q.shape[1] // kv_layer.shape[3]
        out = torch.empty_like(q)
        assert given.query_start[0] == 0
        assert max(given.query_start.diff().tolist()) == given.max_query_len
        assert int(given.query_start[-1]) == q.shape[0]
        assert max(given.context_lens.tolist()) == given.max_context_len
        for row, (begin, end) in enumerate(zip(given.query_start[:-1], given.query_start[1:], strict=True)):
            length = int(given.context_lens[row])
            pages = kv_layer[given.page_tables[row].long()]
            keys, values = (pages[:, half].flatten(0, 1)[:length].repeat_interleave(group, 1) for half in (0, 1))
            score = torch.einsum("qhd,khd->hqk", q[begin:end], keys) * scale
            position = torch.arange(length - int(end - begin), length)[:, None]
            hidden = torch.arange(length)[None] > position
            if sliding_window is not None:
                hidden |= torch.arange(length)[None] <= position - sliding_window
            out[begin:end] = torch.einsum("hqk,khd->qhd", score.masked_fill(hidden, float("-inf")).softmax(-1), values)
        return out * self.factor


@pytest.mark.parametrize("window", [None, 9])
def test_a_plugin_gets_the_chunks_of_a_mixed_step_and_our_kernel_the_decodes(
    device: torch.device, window: int | None
) -> None:
    if device.type != "cpu":
        pytest.skip("the stand-in works on the CPU")
    case = AttentionCase([(1, 30), (1, 7), (11, 40), (20, 20)], num_decodes=2)
    case.kv.nan_to_num_(0.0)  # the stand-in multiplies what it masks
    backend = TritonAttention()
    backend.prefill_plugin = plugin = PlainTorch()
    backend.prepare(case.batch)
    actual = backend.forward(case.q, case.k, case.v, case.kv, case.batch, scale=case.scale, sliding_window=window)
    torch.testing.assert_close(actual.double(), case.expected(window=window), rtol=0, atol=1e-5)
    assert (plugin.steps, plugin.calls) == (1, 1)
    backend.attend(case.q, case.kv, case.batch, scale=case.scale, sliding_window=window, soft_cap=5.0)
    assert plugin.calls == 1  # what libraries treat each in their way stays with us


def attend_with(results: dict[int, Tensor]) -> Callable[[PrefillPlugin | None], Tensor]:
    """A trial whose result without a plug-in is results[0], else that of `plugin.factor`."""

    def attend(plugin: Any) -> Tensor:
        if plugin is None:
            return results[0]
        if plugin.fault is not None:
            raise plugin.fault
        return results[0] * plugin.factor

    return attend


class Watch:
    """Seconds in the order of the measurements."""

    def __init__(self, *seconds: float) -> None:
        self.seconds = list(seconds)

    def __call__(self, work: Callable[[], object]) -> float:
        work()
        return self.seconds.pop(0)


@pytest.mark.parametrize(
    ("plugins", "seconds", "chosen"),
    [
        ([], [], 0),
        ([PlainTorch()], [1.0, 0.5], 1),
        ([PlainTorch()], [1.0, 0.97], 0),  # within what measurements differ by
        ([PlainTorch(), PlainTorch()], [1.0, 0.8, 0.6], 2),
        ([PlainTorch(factor=1.5), PlainTorch()], [1.0, 0.9], 2),  # the first is wrong and not timed
        ([PlainTorch(factor=float("nan"))], [1.0], 0),
        ([PlainTorch(fault=RuntimeError("head size 80 is not supported")), PlainTorch()], [1.0, 0.7], 2),
    ],
)
def test_the_choice(plugins: list[PrefillPlugin], seconds: list[float], chosen: int) -> None:
    attend = attend_with({0: torch.linspace(-1, 1, 50)})
    assert pick(plugins, [attend], attend, Watch(*seconds), dtype=torch.bfloat16, budget_s=60) == chosen


def test_the_choice_ends_with_its_time() -> None:
    attend = attend_with({0: torch.ones(3)})
    now = iter(range(100))
    plugins: list[PrefillPlugin] = [PlainTorch(), PlainTorch()]
    watch = Watch(1.0, 0.9, 0.1)
    assert pick(plugins, [attend], attend, watch, dtype=torch.float32, budget_s=1.5, clock=lambda: next(now)) == 1


def test_a_device_fault_is_not_taken_for_a_missing_feature() -> None:
    attend = attend_with({0: torch.ones(3)})
    broken = PlainTorch(fault=torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(torch.AcceleratorError):
        pick([broken], [attend], attend, Watch(1.0), dtype=torch.float32, budget_s=60)


def test_page_lists_are_the_tables_without_their_padding() -> None:
    tables = torch.tensor([[5, 0, 0], [2, 9, 4], [7, 8, 0]], dtype=torch.int32)
    indptr, indices, last = page_lists(tables, torch.tensor([16, 33, 31], dtype=torch.int32), 16)
    assert indptr.tolist() == [0, 1, 4, 6]
    assert indices.tolist() == [5, 2, 9, 4, 7, 8]
    assert last.tolist() == [16, 1, 15]


def test_what_is_not_installed_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neuron.engine.attention.attention_plugins.find_spec", lambda name: None)
    reasons: dict[str, str] = {}
    assert not list(installed_plugins(reasons.__setitem__))
    assert reasons.keys() == PLUGINS.keys()
    assert "flashinfer is not installed" in reasons.values()


@pytest.mark.parametrize("name", PLUGINS)
@pytest.mark.parametrize("window", [None, 50])
def test_each_library_computes_what_our_kernel_does(device: torch.device, name: str, window: int | None) -> None:
    try:
        plugin = PLUGINS[name]()
    except PluginUnavailable as exc:
        pytest.skip(str(exc))
    if device.type != "cuda":
        pytest.skip(f"{name} needs a GPU")
    shape = HeadShape(8, 2, 128, 16, torch.bfloat16, frozenset({window}))
    attend = _problem(TritonAttention(), shape, window, [(40, 40), (33, 100)], device)
    expected = attend(None)
    try:
        actual = attend(plugin)
    except RuntimeError as exc:
        pytest.skip(f"{name} cannot do this here: {exc}")
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-2)

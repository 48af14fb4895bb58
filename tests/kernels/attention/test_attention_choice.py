"""Which library's attention is taken for prompt chunks, if any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from neuron.engine.attention.attention_choice import HeadShape, _problem, pick
from neuron.engine.attention.attention_plugins import PLUGINS, PluginUnavailable, PrefillPlugin
from neuron.engine.attention.attention_triton import TritonAttention
from torch import Tensor

from tests.kernels.attention.harness import PlainTorch


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

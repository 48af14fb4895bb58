"""The figures that were set as bars, as ratios to the floor of the device at hand, so that they hold on any.

The bars were written for an H200 in milliseconds and tokens per second beside its floors; what is kept of them is how
near to the floor they are. For times a ratio is time / floor (at least 1), for rates rate / floor (at most 1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Bar:
    """is_rate: more is better. good, ahead: ratios to the floor."""

    name: str
    section: str
    match: Mapping[str, Any]
    value: str
    floor: str
    good: float
    ahead: float
    is_rate: bool = False

    def judge(self, report: Mapping[str, Any]) -> Row:
        """The measured figure, its floor, their ratio, and `ahead`, `good`, `missed` or `not measured`."""
        result: Row = {"bar": self.name, "good": self.good, "ahead": self.ahead, "verdict": "not measured"}
        for row in report.get(self.section, []):
            if all(row.get(key) == value for key, value in self.match.items()) and {self.value, self.floor} <= set(row):
                ratio = row[self.value] / row[self.floor]
                result |= {"measured": row[self.value], "floor": row[self.floor], "ratio": ratio}
                result["verdict"] = self._verdict(ratio)
        return result

    def _verdict(self, ratio: float) -> str:
        sign = -1 if self.is_rate else 1
        if sign * ratio <= sign * self.ahead:
            return "ahead"
        return "good" if sign * ratio <= sign * self.good else "missed"


def _decode(name: str, model: str, batch: int, good_ms: float, ahead_ms: float, floor_ms: float) -> Bar:
    match = {"model": model, "case": "decode", "batch": batch}
    return Bar(name, "models", match, "engine_ms", "floor_ms", good_ms / floor_ms, ahead_ms / floor_ms)


def _offline(model: str, good: float, ahead: float, floor: float) -> Bar:
    match = {"model": model}
    return Bar(
        f"{model}, offline mix, tokens/s", "offline", match, "tokens_per_s", "floor_tokens_per_s",
        good / floor, ahead / floor, is_rate=True,
    )  # fmt: skip


BARS: Sequence[Bar] = (
    _decode("Qwen3-8B, batch 1, ms", "Qwen3-8B", 1, 4.9, 4.3, 3.55),
    _decode("Qwen3-8B, batch 32, ms", "Qwen3-8B", 32, 5.7, 5.2, 4.2),
    _decode("Qwen3-8B, batch 256, ms", "Qwen3-8B", 256, 12.7, 11.5, 9.2),
    _decode("Qwen3-0.6B, batch 1, ms", "Qwen3-0.6B", 1, 1.3, 0.9, 0.30),
    _offline("Qwen3-0.6B", 22_000, 28_000, 36_500),
    _offline("Qwen3-8B", 9_500, 11_000, 13_100),
    Bar(
        "Qwen3-8B, first token of 8k, ms", "models", {"model": "Qwen3-8B", "case": "prefill", "context": 8192},
        "engine_ms", "floor_ms", 240 / 169, 220 / 169,
    ),
    Bar("load from page cache, s", "loading", {"case": "load"}, "seconds", "floor_s", 1 / 0.5, 1 / 0.8),
    Bar("swap back from memory, s", "loading", {"case": "swap"}, "seconds", "floor_s", 2.0, 1.3),
)  # fmt: skip


def judge(report: Mapping[str, Any]) -> list[Row]:
    return [bar.judge(report) for bar in BARS]


def print_bars(rows: Sequence[Row]) -> None:
    print(f"\n{'bars (ratio to the floor here)':<36}{'measured':>12}{'floor':>12}{'ratio':>8}{'good':>8}{'ahead':>8}")
    for row in rows:
        figures = (
            f"{row['measured']:>12.4g}{row['floor']:>12.4g}{row['ratio']:>8.2f}" if "ratio" in row else f"{'-':>32}"
        )
        print(f"{row['bar']:<36}{figures}{row['good']:>8.2f}{row['ahead']:>8.2f}  {row['verdict']}")

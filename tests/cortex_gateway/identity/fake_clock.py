"""Clocks that a test moves: real time passes for everyone, a date is set for one host."""

from __future__ import annotations

from typing import NamedTuple

NOW = 1_700_000_000_000


class Time:
    """What really passes, milliseconds."""

    def __init__(self) -> None:
        self.passed_ms = 0


class FakeClock:
    """One host's clocks. `pass_ms` lets time pass, `set_ms` sets the date without any passing."""

    def __init__(self, time: Time | None = None, *, ahead_ms: int = 0, boot: str = "boot 1") -> None:
        self.time = time or Time()
        self.ahead_ms = ahead_ms
        self.boot = boot

    def wall_ms(self) -> int:
        return NOW + self.time.passed_ms + self.ahead_ms

    def elapsed_ms(self) -> int:
        return 5_000 + self.time.passed_ms

    def pass_ms(self, milliseconds: int) -> None:
        self.time.passed_ms += milliseconds

    def set_ms(self, milliseconds: int) -> None:
        self.ahead_ms += milliseconds


class Used(NamedTuple):
    """An amount, and when it was really used."""

    at: int
    amount: int

"""Restart policy: the pause before a group that died is rebuilt, and when it is given up. Pure."""

from __future__ import annotations

import math

import msgspec

_FIRST_DELAY_S = 1.0
_LONGEST_DELAY_S = 30.0


class RestartPolicy(msgspec.Struct, frozen=True):
    """attempts: rebuilds in a row before giving up. stable_after_s: a life this long makes the next death a first.

    Finding the one request that kills its engine takes three deaths, the last of which is explained and not counted;
    with fewer than two attempts such a request takes the model down.
    """

    attempts: int = 5
    stable_after_s: float = 60.0

    def failures_after(self, failures: int, lived_s: float) -> int:
        """Deaths in a row, counting the one after a life of `lived_s` (0 for a rebuild that never came up)."""
        return 1 if self.is_stable(lived_s) else failures + 1

    def is_stable(self, lived_s: float) -> bool:
        return lived_s >= self.stable_after_s

    def delay_before(self, failures: int) -> float | None:
        """Seconds to wait before the rebuild that follows the `failures`-th death in a row; None gives up.

        The first is rebuilt at once, then 1, 2, 4 … up to 30 s.
        """
        if failures > self.attempts:
            return None
        if failures <= 1:
            return 0.0
        return min(math.ldexp(_FIRST_DELAY_S, failures - 2), _LONGEST_DELAY_S)

    @staticmethod
    def retry_after(delay_s: float, load_s: float) -> int:
        """Whole seconds until a client's retry makes sense."""
        return max(1, min(120, math.ceil(delay_s + load_s)))

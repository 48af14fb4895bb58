"""Parts of a long run, each with a time of its own: what one has found is kept whatever becomes of it or the others."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

Row = dict[str, Any]


class _TimeIsUp(BaseException):
    """No Exception, so that nothing that catches those goes on."""


class Sections:
    """budget_s: of all together. note: says what happens. on_end: called after each section."""

    def __init__(self, budget_s: float, *, note: Callable[[str], None], on_end: Callable[[], None]) -> None:
        self.outcomes: list[Row] = []
        self._deadline = time.perf_counter() + budget_s
        self._note = note
        self._on_end = on_end

    @property
    def failed(self) -> list[str]:
        """Names of those that ended with an error."""
        return [row["section"] for row in self.outcomes if row["outcome"] == "failed"]

    def run(self, name: str, budget_s: float, rows: Iterable[Row], into: list[Row]) -> None:
        """Put every row into `into` as it comes, until there are no more, time is up, or something breaks."""
        started = time.perf_counter()
        budget_s = min(budget_s, self._deadline - started)
        outcome: Row = {"section": name, "budget_s": round(budget_s, 1), "outcome": "done"}
        if budget_s <= 0:
            outcome |= {"outcome": "not begun", "detail": "the time for all was up"}
        else:
            self._run(rows, into, budget_s, outcome)
        outcome["seconds"] = round(time.perf_counter() - started, 1)
        self.outcomes.append(outcome)
        if outcome["outcome"] != "done":
            self._note(f"section {name}: {outcome['outcome']} ({outcome['detail']})")
        self._on_end()

    @staticmethod
    def _run(rows: Iterable[Row], into: list[Row], budget_s: float, outcome: Row) -> None:
        def ring(number: int, frame: FrameType | None) -> None:
            raise _TimeIsUp

        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, budget_s)
        try:
            into.extend(rows)  # a list takes each row as it comes, so those before the end are kept
        except _TimeIsUp:
            outcome |= {"outcome": "cut short", "detail": f"{budget_s:.0f} s were up"}
        except Exception as error:  # others are still to be measured
            outcome |= {"outcome": "failed", "detail": f"{type(error).__name__}: {str(error)[:300]}"}
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

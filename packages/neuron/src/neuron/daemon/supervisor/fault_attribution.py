"""Attribution of an engine's death to a request, and who goes into its successor when. Pure: no clock, no I/O.

Every sequence that was in the engine when it died was *in the path* of the fault. After the first death of a series
all of them go on together: most faults come from outside. Those in the path a second time are suspects. A suspect is
replayed alone, while everyone else waits, until it has passed the place where the engine died; if the engine dies
while it holds nothing but a suspect, that one is the cause, it fails, and the others go on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from neuron.daemon.supervisor.generation import LiveSequence

_SUSPECT_AFTER = 2
# The last frames of a dying engine may not have reached us: it may have died a little further on than we know.
_PASSED_BY_TOKENS = 4


def is_suspect(sequence: LiveSequence) -> bool:
    """Whether it was in the path twice and has not got beyond the place where its engine died last."""
    return (
        sequence.num_faults >= _SUSPECT_AFTER
        and len(sequence.output_ids) < sequence.num_output_at_fault + _PASSED_BY_TOKENS
    )


def book_death(in_engine: Collection[LiveSequence], *, was_stable: bool) -> LiveSequence | None:
    """Note who was in the path of a fault; returns the one that is the cause, where that is certain.

    was_stable: the engine had lived long enough for this to be the first death of a new series. It is one for each
    sequence that has got beyond the place of its last fault.
    """
    if len(in_engine) == 1:
        (only,) = in_engine
        if is_suspect(only):
            return only
    for sequence in in_engine:
        if was_stable and len(sequence.output_ids) >= sequence.num_output_at_fault + _PASSED_BY_TOKENS:
            sequence.num_faults = 0
        sequence.num_faults += 1
        sequence.num_output_at_fault = len(sequence.output_ids)
    return None


def due(
    waiting: Iterable[LiveSequence], in_engine: Iterable[LiveSequence], *, is_engine_empty: bool
) -> list[LiveSequence]:
    """Which of the waiting sequences go to the engine now, in order of arrival.

    is_engine_empty: the engine itself has said that it holds nothing, so what was cancelled there is gone.
    """
    in_order = sorted(waiting, key=_by_number)
    suspect = next(filter(is_suspect, in_order), None)
    if suspect is not None:
        return [suspect] if is_engine_empty else []
    if any(map(is_suspect, in_engine)):
        return []
    return in_order


def _by_number(sequence: LiveSequence) -> int:
    return sequence.number

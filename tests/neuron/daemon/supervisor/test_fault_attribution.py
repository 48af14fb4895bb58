from __future__ import annotations

import random
from typing import Any, cast

from hypothesis import given, settings
from hypothesis import strategies as st
from neuron.daemon.supervisor import fault_attribution
from neuron.daemon.supervisor.generation import LiveSequence

from tests.neuron.scripted_engine import request


def sequence(number: int) -> LiveSequence:
    return LiveSequence(number, 0, request(9), cast(Any, None))


def test_after_a_first_death_all_go_on_together() -> None:
    sequences = [sequence(number) for number in (3, 1, 2)]
    assert fault_attribution.book_death(sequences, was_stable=False) is None
    assert [item.number for item in fault_attribution.due(sequences, [], is_engine_empty=True)] == [1, 2, 3]


def test_those_in_the_path_twice_go_alone_and_the_others_wait() -> None:
    first, second, newcomer = map(sequence, (1, 2, 3))
    for _ in range(2):
        assert fault_attribution.book_death([first, second], was_stable=False) is None
    assert fault_attribution.due([newcomer, second, first], [], is_engine_empty=True) == [first]
    assert fault_attribution.due([newcomer, second], [first], is_engine_empty=False) == []


def test_a_suspect_waits_until_the_engine_says_that_it_is_empty() -> None:
    suspect = sequence(1)
    for _ in range(2):
        fault_attribution.book_death([suspect, sequence(2)], was_stable=False)
    assert fault_attribution.due([suspect], [], is_engine_empty=False) == []


def test_a_suspect_is_one_until_it_is_past_the_place() -> None:
    suspect, other = map(sequence, (1, 2))
    suspect.output_ids = [7, 7]
    for _ in range(2):
        fault_attribution.book_death([suspect, other], was_stable=False)
    suspect.output_ids += [7]
    assert fault_attribution.is_suspect(suspect)
    suspect.output_ids += [7] * 3
    assert not fault_attribution.is_suspect(suspect)
    fault_attribution.book_death([suspect, other], was_stable=False)
    assert fault_attribution.is_suspect(suspect), "in the same series it is alone again at once"


def test_a_suspect_that_dies_alone_is_the_cause() -> None:
    suspect = sequence(1)
    assert fault_attribution.book_death([suspect], was_stable=False) is None
    assert fault_attribution.book_death([suspect], was_stable=False) is None
    assert fault_attribution.book_death([suspect], was_stable=False) is suspect


def test_a_stable_life_clears_who_got_beyond_the_place() -> None:
    suspect, stuck = map(sequence, (1, 2))
    fault_attribution.book_death([suspect, stuck], was_stable=False)
    suspect.output_ids = [7] * 4
    fault_attribution.book_death([suspect, stuck], was_stable=True)
    assert not fault_attribution.is_suspect(suspect)
    assert fault_attribution.is_suspect(stuck), "however long the prefill that it dies in"


@settings(max_examples=200, deadline=None)
@given(
    num_sequences=st.integers(1, 8),
    culprits=st.sets(st.integers(0, 7), max_size=3),
    seed=st.integers(0, 2**32),
)
def test_exactly_the_culprits_fail_and_everybody_else_completes(
    num_sequences: int, culprits: set[int], seed: int
) -> None:
    """An engine that dies whenever a culprit reaches its place, whatever else it holds and however far that is."""
    draw = random.Random(seed)
    everyone = [sequence(number) for number in range(num_sequences)]
    place = {number: draw.randrange(40) for number in culprits if number < num_sequences}
    waiting, in_engine = list(everyone), []
    failed: set[int] = set()
    for _ in range(20_000):
        if not waiting and not in_engine:
            break
        for item in fault_attribution.due(waiting, in_engine, is_engine_empty=not in_engine):
            waiting.remove(item)
            in_engine.append(item)
        killer = next((item for item in in_engine if len(item.output_ids) == place.get(item.number, -1)), None)
        if killer is not None:
            cause = fault_attribution.book_death(in_engine, was_stable=draw.random() < 0.3)
            waiting += in_engine
            in_engine = []
            if cause is not None:
                waiting.remove(cause)
                failed.add(cause.number)
            continue
        for item in list(in_engine):
            if draw.random() < 0.7:  # prefills and queues: not everyone gets a token in every step
                item.output_ids.append(0)
            if len(item.output_ids) >= 50:
                in_engine.remove(item)
            elif not fault_attribution.is_suspect(item) and any(map(fault_attribution.is_suspect, waiting)):
                in_engine.remove(item)
                waiting.append(item)
    assert not waiting and not in_engine
    assert failed == set(place)

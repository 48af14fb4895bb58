"""Faults do what they say, where they say it, and are nowhere without being asked for."""

from __future__ import annotations

import pytest
from neuron.engine.errors import DeviceError, ModelError
from neuron.engine.loading.fault_injection import Faults
from neuron.engine.step import engine

from tests.neuron.engine.toy import VOCAB, ToyModel, answer_alone, request, run, toy_engine


def faulty_engine(*faults: dict, epoch: int = 0, rank: int = 0, **settings):
    found = Faults({"levers": list(faults)}, rank=rank, epoch=epoch)
    built = toy_engine(found.around(ToyModel()), **settings)
    found.arm()
    return built


def test_without_levers_the_model_is_the_model():
    model = ToyModel()
    assert Faults({}, rank=0, epoch=0).around(model) is model
    elsewhere = {"levers": [{"lever": "kill", "rank": 1, "step": 1}, {"lever": "kill", "step": 1, "epochs": [1]}]}
    assert Faults(elsewhere, rank=0, epoch=0).around(model) is model


@pytest.mark.parametrize(
    "debug", [{"lever": []}, {"levers": [{"lever": "explode"}]}, {"levers": [{"lever": "kill", "at": 3}]}]
)
def test_a_lever_that_is_not_known_fails_the_load(debug):
    with pytest.raises(ModelError, match="debug levers"):
        Faults(debug, rank=0, epoch=0)


def test_poison_reaches_one_row_of_one_step():
    faulty = faulty_engine({"lever": "poison", "step": 3, "row": 1})
    answers = run(faulty, *(request(number, [number, 5, 6], 8) for number in range(3)))
    assert set(answers.failures) == {1}
    failure = answers.failures[1]
    assert failure.kind == "nan_logits" and failure.health is not None
    assert (failure.health.nan, failure.health.finite_mean) == (VOCAB, None)
    for number in (0, 2):
        assert answers.tokens[number] == answer_alone([number, 5, 6], 8)


def test_poison_by_token_follows_its_sequence():
    faulty = faulty_engine({"lever": "poison", "token": 77, "value": "inf"})
    answers = run(faulty, request(0, [1, 2, 3], 3), request(1, [4, 77, 5], 3))
    assert set(answers.failures) == {1}
    assert answers.failures[1].health.pos_inf > 0


def test_out_of_memory_for_a_few_steps_loses_nobody(monkeypatch):
    monkeypatch.setattr(engine, "_DEFER_S", (0.0,))
    faulty = faulty_engine({"lever": "out_of_memory", "step": 2, "times": 3})
    items = [request(number, range(number, number + 20), 6) for number in range(3)]
    answers = run(faulty, *items)
    assert answers.failures == {}
    for item in items:
        assert answers.tokens[item.request_id] == answer_alone(item.prompt_ids, 6)


def test_a_device_fault_ends_the_engine():
    faulty = faulty_engine({"lever": "device_fault", "step": 1})
    faulty.add(request(0, [1]))
    with pytest.raises(DeviceError, match="illegal memory access"):
        faulty.step()


def test_loads_can_be_failed_and_slowed():
    with pytest.raises(ModelError, match="at weights"):
        Faults({"levers": [{"lever": "fail_load", "epochs": [2]}]}, rank=0, epoch=2).enter("weights")
    Faults({"levers": [{"lever": "fail_load", "epochs": [2]}]}, rank=0, epoch=1).enter("weights")
    seen: list[tuple[int, int]] = []
    slowed = Faults({"levers": [{"lever": "slow_disk", "seconds_per_mb": 0.001}]}, rank=0, epoch=0).slowed(
        lambda done, total: seen.append((done, total))
    )
    slowed(10, 20)
    slowed(20, 20)
    assert seen == [(10, 20), (20, 20)]

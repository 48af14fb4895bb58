from __future__ import annotations

from cortex_core.errors import ApiError
from cortex_core.fleet import Activation, ActivationFailure, ModelSpec
from neuron.daemon.lifecycle.startup_loads import Activator

OFFLINE = ApiError("overloaded", "no network", code="repo_fetch_failed", retry_after=10)
BROKEN = ApiError("invalid_request", "no weights", code="empty_repo", status=422)


class Loads:
    """A load that raises what is scripted for a model, one entry per attempt."""

    def __init__(self, **errors: list[ApiError]) -> None:
        self.errors = errors
        self.asked: list[str] = []
        self.seen: list[Activation] = []
        self.activator: Activator | None = None

    async def __call__(self, spec: ModelSpec) -> None:
        assert self.activator is not None
        self.asked.append(spec.model_id)
        self.seen.append(self.activator.status)
        errors = self.errors.get(spec.model_id, [])
        if errors:
            raise errors.pop(0)


def activator(loads: Loads, *models: str, retries: int = 2) -> Activator:
    loads.activator = Activator([ModelSpec(model) for model in models], loads, retry_delays_s=[0.0] * retries)
    return loads.activator


async def test_nothing_to_load_is_ready_at_once() -> None:
    assert activator(Loads()).status == Activation()


async def test_models_load_one_after_the_other_and_a_failure_stops_none() -> None:
    loads = Loads(b=[BROKEN])
    run = activator(loads, "a", "b", "c")
    assert run.status == Activation("pre_warming", pending=("a", "b", "c"))
    await run.run()
    assert loads.seen[1] == Activation("pre_warming", pending=("c",), in_progress="b", completed=("a",))
    assert run.status == Activation("ready", completed=("a", "c"), failed=(ActivationFailure("b", "no weights"),))


async def test_F35_a_fetch_that_may_succeed_later_is_deferred_and_retried() -> None:
    loads = Loads(a=[OFFLINE, OFFLINE])
    run = activator(loads, "a", "b")
    await run.run()
    assert loads.asked == ["a", "b", "a", "a"]
    assert run.status == Activation("ready", completed=("b", "a"))


async def test_retries_end() -> None:
    loads = Loads(a=[OFFLINE] * 9)
    run = activator(loads, "a", retries=2)
    await run.run()
    assert loads.asked == ["a"] * 3
    assert run.status == Activation("ready", failed=(ActivationFailure("a", "no network"),))


async def test_what_is_wrong_for_good_is_not_retried() -> None:
    loads = Loads(a=[BROKEN] * 2)
    run = activator(loads, "a")
    await run.run()
    assert loads.asked == ["a"]


async def test_H7_a_model_that_ended_the_daemon_waits_and_shows_when_it_is_tried_again() -> None:
    loads = Loads()
    pauses = {"a": 0.02, "b": 0.01}
    run = loads.activator = Activator(
        [ModelSpec(model) for model in ("a", "b", "c")],
        loads,
        pause_s=lambda spec: pauses.get(spec.model_id, 0.0),
        fault=lambda spec: f"It ended while it loaded {spec.model_id}.",
    )
    await run.run()
    assert loads.asked == ["c", "b", "a"]
    waiting = loads.seen[0].failed
    assert [failure.model_id for failure in waiting] == ["b", "a"]
    assert all(failure.retry_at is not None and "ended while it loaded" in failure.error for failure in waiting)
    assert loads.seen[1].failed == waiting[1:] and loads.seen[1].in_progress == "b"
    assert run.status == Activation("ready", completed=("c", "b", "a"))

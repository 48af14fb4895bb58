"""O1: nobody waits for memory that nothing of ours will free, and whoever waits is told for what."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import msgspec
import pytest
from cortex_core.catalogue import Catalogue, ModelProfile
from cortex_core.fleet import ModelLoad
from cortex_gateway.fleet.activity import Activity
from cortex_gateway.fleet.snapshot import HOST, Operation, Shortage
from cortex_gateway.placement.decision import Hold, Load, Refuse
from cortex_gateway.placement.evictor import account, may_yield, plan_room
from cortex_gateway.placement.explanation import explain
from cortex_gateway.placement.router import decide
from cortex_gateway.placement.state import PlacementState
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.cortex_gateway.fake_neuron import FakeNeuron
from tests.cortex_gateway.gateway_client import MODEL, Client, Start, until
from tests.cortex_gateway.placement.harness import SIZES, decided, models, shortage

from .fleets import INCOMING, fleet, node, situations, state
from .simulation import Arrival, Node
from .test_placement import admin, ask, node_of, sized


def without(drawn: PlacementState, statuses: tuple[str, ...]) -> PlacementState:
    """As if the models of these statuses had never been there."""
    nodes = []
    for each in drawn.snapshot.nodes.values():
        kept = {model: info for model, info in each.models.items() if each.status(model) not in statuses}
        nodes.append(msgspec.structs.replace(each, models=kept))
    return msgspec.structs.replace(drawn, snapshot=fleet(*nodes))


@settings(max_examples=400)
@given(situations())
def test_O1_a_model_that_failed_changes_no_decision_for_another_nor_for_itself(drawn: PlacementState) -> None:
    assume(all(model not in drawn.waiting for model in failed_models(drawn)))  # else it has its place in the queue
    assert decide(INCOMING, drawn) == decide(INCOMING, without(drawn, ("failed", "unloaded")))


def failed_models(drawn: PlacementState) -> set[str]:
    return {
        model
        for each in drawn.snapshot.nodes.values()
        for model in each.models
        if each.status(model) in ("failed", "unloaded")
    }


@settings(max_examples=400)
@given(situations())
def test_O1_whoever_waits_for_room_could_be_loaded_were_ours_gone(drawn: PlacementState) -> None:
    decision = decide(INCOMING, msgspec.structs.replace(drawn, waiting=state().waiting))
    if not isinstance(decision, Hold) or decision.reason not in ("busy", "settling"):
        return
    each = drawn.snapshot.nodes[decision.node]
    profile = drawn.catalogue.profile(INCOMING)
    assert profile is not None
    yielding = may_yield(each, INCOMING, drawn)
    assert yielding
    assert all(each.status(model) not in ("failed", "unloaded") for model in yielding)
    assert plan_room(profile, each, drawn).fits_later or INCOMING in each.load_failures
    wait = explain(INCOMING, decision, drawn)
    assert wait.behind == tuple(yielding) and all(model in wait.text for model in yielding)


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.floats(0, 60), st.sampled_from("abc"), st.floats(0.01, 20)).map(lambda drawn: Arrival(*drawn)),
        min_size=1,
        max_size=30,
    ),
    st.integers(0, 12_000),
)
def test_O1_a_model_that_others_leave_no_room_for_keeps_nobody_waiting(arrivals: list[Arrival], others_mb: int) -> None:
    """`x` is refused at its neuron again and again; what fits goes on as if nobody had asked for it."""
    sizes = {"a": 5_000, "b": 12_000, "c": 11_000, "x": 23_000}
    simulated = Node(sizes, load_s=2.0, others_mb=others_mb, patience_s=10.0)
    wanted = [Arrival(0.0, "x", 1.0), *arrivals, Arrival(30.0, "x", 1.0)]
    simulated.run(sorted(wanted))
    assert not simulated.evicted_in_use
    if others_mb > 1_000:
        assert {refused.model for refused in simulated.refused} == {"x"}
        longest = max(arrival.service_s for arrival in arrivals)
        assert all(refused.at - refused.arrived <= 10.0 * 3 + 2 * longest + 8.0 for refused in simulated.refused)


@pytest.mark.parametrize("waited_s", [None, 0.0, 29.0, 31.0, 600.0])
@pytest.mark.parametrize(
    "having",
    [{"m": "failed"}, {"a": "failed"}, {"m": "failed", "a": "failed", "b": "unloaded"}, {"a": "unloaded"}, {}],
    ids=["itself failed", "another failed", "all failed", "unloaded", "others' alone"],
)
def test_O1_what_nothing_of_ours_will_free_is_tried_at_once(having: dict[str, str], waited_s: float | None) -> None:
    """4,000 MB free of 24,000, and none of the rest is held by a model that is there."""
    decision = decided(node(having=having, free_mb=[4_000]), waited_s=waited_s)
    assert isinstance(decision, Load) and decision.victims == ()


def test_O1_what_is_loaded_but_may_not_go_or_would_not_suffice_is_no_reason_to_wait() -> None:
    pinned = node(having={"a": "loaded"}, free_mb=[4_000], pins=frozenset(("a",)))
    assert isinstance(decided(pinned), Load)
    busy = Activity()
    busy.begin("alpha", "b", 99.0)
    small = node(having={"b": "loaded"}, free_mb=[4_000])
    assert isinstance(decided(small, activity=busy), Load), "4,000 and 4,000 are not 20,000"


@pytest.mark.parametrize("status", ["loading", "recovering", "unloading", "loaded"])
def test_O1_what_is_ours_and_on_its_way_is_waited_for_where_it_suffices(status: str) -> None:
    busy = Activity()
    busy.begin("alpha", "a", 99.0)
    there = node(having={"a": status}, free_mb=[20_000 if status == "loading" else 6_000])
    held = decided(there, activity=busy)
    assert isinstance(held, Hold) and held.reason == "busy"
    small = node(having={"b": status}, free_mb=[4_000], operations={})
    assert isinstance(decided(small), Load)


def test_O1_a_recovering_model_frees_no_more_than_the_device_has() -> None:
    """Its engine is dead, and what it held may be free already."""
    there = node(having={"a": "recovering"}, free_mb=[18_000], total_mb=[19_000])
    assert not plan_room(ModelProfile(id="m", vram_mb=20_000), there, state(there, catalogue=SIZES)).fits_later


def test_O1_after_a_refusal_it_is_tried_as_soon_as_as_much_has_come_free() -> None:
    """Whoever freed it: a pause of minutes is for what has not changed."""
    failed = node(free_mb=[4_000], load_failures={"m": shortage(20_000, 4_000)})
    assert isinstance(decided(failed), Refuse)
    more = msgspec.structs.replace(failed, devices=node(free_mb=[19_999]).devices)
    assert isinstance(decided(more), Refuse)
    enough = msgspec.structs.replace(failed, devices=node(free_mb=[20_000]).devices)
    assert isinstance(decided(enough), Load)


def test_O1_a_neuron_that_says_that_a_load_going_on_is_in_the_way_is_believed_as_long_as_one_does() -> None:
    # 20,000 are free, and 16,000 of them promised to the one that comes.
    failure = msgspec.structs.replace(shortage(20_000, 4_000, is_passing=True), free_mb={0: 20_000})
    arriving = node(having={"a": "loading"}, free_mb=[20_000], load_failures={"m": failure})
    assert decided(arriving, catalogue=models(m=20_000)) == Hold(node="alpha", reason="busy", until=200.0)
    elsewhere = msgspec.structs.replace(arriving, models={}, devices=node(free_mb=[19_999]).devices)
    assert isinstance(decided(elsewhere, catalogue=models(m=20_000)), Refuse)


def test_O1_a_refusal_that_polls_contradict_is_tried_again_a_few_times() -> None:
    """What was in the way, of another gateway's, has gone between the refusal and the next look."""
    failure = msgspec.structs.replace(shortage(20_000, 4_000), free_mb={0: 24_000})
    for count, expected in ((1, Hold), (3, Hold), (4, Refuse)):
        failed = node(free_mb=[24_000], load_failures={"m": msgspec.structs.replace(failure, count=count)})
        assert type(decided(failed)) is expected
    short = node(free_mb=[19_000], load_failures={"m": msgspec.structs.replace(failure, free_mb={0: 19_000})})
    assert isinstance(decided(short), Refuse)


def test_O1_one_node_where_room_may_come_is_enough() -> None:
    busy = Activity()
    busy.begin("beta", "a", 99.0)
    alpha = node("alpha", free_mb=[4_000], load_failures={"m": shortage(20_000, 4_000)})
    later = msgspec.structs.replace(shortage(20_000, 6_000), until=300.0)
    beta = node("beta", having={"a": "loaded"}, free_mb=[6_000], load_failures={"m": later})
    assert decide("m", state(alpha, beta, catalogue=SIZES, activity=busy)) == Hold("beta", "busy", until=300.0)


def test_O1_a_host_without_accelerators_has_its_memory_counted_alike() -> None:
    failed = node(
        having={"b": "loaded"},
        free_mb=[],
        memory_free_mb=4_000,
        load_failures={"m": msgspec.structs.replace(shortage(20_000, 4_000), free_mb={HOST: 4_000})},
    )
    missing = Shortage(needed_mb=20_000, free_mb=4_000, required_mb={HOST: 20_000}, available_mb={HOST: 4_000})
    failure = msgspec.structs.replace(failed.load_failures["m"], shortage=missing)
    assert isinstance(decided(msgspec.structs.replace(failed, load_failures={"m": failure})), Refuse)


def test_O1_who_cannot_be_placed_holds_up_nobody_behind() -> None:
    """`n` has waited longer, and nothing will make room for it: `m` needs not queue behind it."""
    catalogue = models(m=8_000, n=23_000, a=16_000)
    full = node(having={"a": "loaded"}, free_mb=[2_000])
    decision = decide("m", state(full, catalogue=catalogue, waiting={"n": 50.0, "m": 90.0}))
    assert isinstance(decision, Load) and decision.victims == ("a",)


async def test_O1_a_failed_load_of_a_model_that_no_longer_fits_answers_the_next_request_at_once(
    neuron: FakeNeuron, start: Start
) -> None:
    """The case: `load_wait_s` is half an hour, and the second request took all of it."""
    neuron.enforce_memory = True
    neuron.footprints = {MODEL: 20_000}
    neuron.load_error = (500, {"error": {"message": "the engine died", "code": "load_failed"}})
    client = await start(neuron, catalogue=sized(MODEL))
    assert (await client.chat())[0] == 503
    neuron.have(MODEL, status="failed", error="the engine died")
    neuron.load_error = None
    neuron.others_mb = 22_000  # a program that is none of ours
    await let_the_pause_end(client)
    status, document = await client.chat()
    error = document["error"]
    assert (status, error["code"]) == (503, "insufficient_vram")
    assert [error[name] for name in ("needed_mb", "free_mb", "displaceable_mb", "others_mb")] == [
        20_000,
        2_000,
        0,
        22_000,
    ]
    assert "22000 MB by others" in error["message"]
    attempts = neuron.count("POST /models/load")
    for _ in range(5):
        async with client.post("/v1/chat/completions", {"model": MODEL, "messages": []}) as response:
            assert (response.status, json.loads(await response.read())["error"]["code"]) == (503, "insufficient_vram")
            assert int(response.headers["retry-after"]) >= 1
    assert neuron.count("POST /models/load") == attempts, "a refusal is remembered, not repeated for each request"
    neuron.others_mb = 0
    async with client.get("/admin/fleet?refresh=1"):
        pass
    assert (await client.chat())[0] == 200, "and once there is room, it is not waited for the end of any pause"


async def let_the_pause_end(client: Client) -> None:
    async with asyncio.timeout(30):
        while (failure := node_of(client).load_failures.get(MODEL)) is not None:
            now = client.started.gateway.placement.state().now
            if failure.until <= now:
                return
            await asyncio.sleep(failure.until - now)


async def test_O1_another_models_failure_delays_nobody(neuron: FakeNeuron, start: Start) -> None:
    neuron.enforce_memory = True
    neuron.footprints = {"a": 16_000, "m": 20_000}
    neuron.others_mb = 20_000
    neuron.have("a", status="failed", error="no")
    client = await start(neuron, catalogue=SIZES, eviction={"patience_s": 600.0})
    status, document = await client.chat(model="m")
    assert (status, document["error"]["code"]) == (503, "insufficient_vram")


async def test_O1_nobody_is_evicted_where_that_would_not_make_room(neuron: FakeNeuron, start: Start) -> None:
    """The catalogue has no size for it: only the neuron's refusal says how much is lacking."""
    neuron.enforce_memory = True
    neuron.footprints = {"a": 2_000, "b": 2_000, "m": 20_000}
    neuron.others_mb = 10_000
    for model in ("a", "b"):
        neuron.have(model)
    client = await start(neuron, catalogue=Catalogue(models=(*models(a=2_000, b=2_000).models, ModelProfile(id="m"))))
    status, document = await client.chat(model="m")
    assert (status, document["error"]["code"]) == (503, "insufficient_vram")
    assert document["error"]["displaceable_mb"] == 4_000
    assert sorted(neuron.models) == ["a", "b"]


async def test_O1_room_that_a_busy_model_holds_is_waited_for_and_told(
    neuron: FakeNeuron, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    neuron.enforce_memory = True
    neuron.footprints = {"a": 16_000, "m": 20_000}
    neuron.have("a")
    neuron.answer_gate.clear()
    settings = {"unstreamed_wait_s": 0.5, "show_loading": True, "stream_hold_s": 0.0, "ping_interval_s": 0.05}
    client = await start(neuron, catalogue=SIZES, gateway=settings)
    at_work = asyncio.ensure_future(client.chat(model="a"))
    await neuron.request_arrived.wait()
    body = {"model": "m", "messages": [], "stream": True}
    async with client.post("/v1/chat/completions", body) as stream:
        line = await stream.content.readline()
        assert line.startswith(b": m waits for room on alpha") and b"a (1 request at work)" in line
        status, document = await client.chat(model="m")
        error = document["error"]
        assert (status, error["code"], error["node"], error["reason"]) == (503, "model_queued", "alpha", "busy")
        assert error["behind"] == ["a"] and error["needed_mb"] == 20_000 and error["displaceable_mb"] == 16_000
        assert "a (1 request at work)" in error["message"]
        async with client.get("/admin/fleet") as response:
            (queue,) = json.loads(await response.read())["waiting"]
        assert (queue["model"], queue["for"]["reason"], queue["for"]["behind"]) == ("m", "busy", ["a"])
        neuron.answer_gate.set()
        assert (await at_work)[0] == 200
        assert b"[DONE]" in await stream.read()
    told = [record.message for record in caplog.records if record.message.startswith("requests for m wait for")]
    assert len([line for line in told if "a (1 request at work)" in line]) == 1, "once, not for each request"
    assert not client.started.gateway.placement._told


async def test_O1_a_load_by_hand_waits_with_events_that_say_for_what_and_does_not_hammer(
    neuron: FakeNeuron, start: Start
) -> None:
    neuron.enforce_memory = True
    neuron.footprints = {"a": 16_000, "m": 20_000}
    neuron.have("a")
    neuron.answer_gate.clear()
    client = await start(neuron, catalogue=models(a=16_000))
    at_work = asyncio.ensure_future(client.chat(model="a"))
    await neuron.request_arrived.wait()
    headers = {"accept": "text/event-stream"}
    async with client.post("/admin/models/load", {"model": "m", "node": "alpha"}, headers=headers) as response:
        line = b""
        while not line.startswith(b"event: waiting"):
            line = await response.content.readline()
        wait = json.loads((await response.content.readline()).removeprefix(b"data: "))
        assert wait["node"] == "alpha" and "a (1 request at work)" in wait["text"]
        for _ in range(4):  # looks at the node, which would each have been another attempt
            neuron.polled.clear()
            await neuron.polled.wait()
        assert neuron.count("POST /models/load") == 1
        neuron.answer_gate.set()
        assert (await at_work)[0] == 200
        assert b"event: done" in await response.read()


async def test_O1_a_load_by_hand_is_not_held_up_by_a_failure(neuron: FakeNeuron, start: Start) -> None:
    neuron.load_error = (503, {"error": "driver mismatch", "code": "cuda_unavailable"})
    client = await start(neuron, catalogue=sized(MODEL))
    for _ in range(3):
        assert (await client.chat())[0] == 503
    assert neuron.count("POST /models/load") == 1
    neuron.load_error = None
    assert (await client.chat())[0] == 503
    assert (await admin(client, "load", model=MODEL))[0] == 200


async def test_O1_a_load_whose_leader_leaves_goes_on_for_the_others(neuron: FakeNeuron, start: Start) -> None:
    neuron.load_gate.clear()
    client = await start(neuron, catalogue=sized(MODEL))
    leader = asyncio.ensure_future(client.chat())
    await neuron.load_started.wait()
    others = [asyncio.ensure_future(client.chat()) for _ in range(10)]
    async with asyncio.timeout(10):
        while client.started.gateway.relay.num_active < 11:
            await asyncio.sleep(0)
    leader.cancel()
    async with asyncio.timeout(10):
        while client.started.gateway.relay.num_active > 10:
            await asyncio.sleep(0.01)
    neuron.load_gate.set()
    assert {status for status, _ in await asyncio.gather(*others)} == {200}
    assert neuron.count("POST /models/load") == 1


async def test_O1_a_load_on_a_host_that_is_gone_is_given_up_when_polls_miss_it(
    neuron: FakeNeuron, second: FakeNeuron, start: Start
) -> None:
    """Such a host closes no connection: the load's own deadline is half an hour away."""
    neuron.load_gate.clear()
    second.footprints = {"other": 12_000}
    second.have("other")
    poll = {"interval_s": 0.05, "timeout_s": 0.2, "unhealthy_after": 2}
    client = await start(neuron, second, catalogue=sized(MODEL), poll=poll)
    asking = asyncio.ensure_future(ask(client))
    await neuron.load_started.wait()
    neuron.models_hang = True
    await until(lambda: node_of(client).health == "unhealthy", client)
    assert (await asking)["x-cortex-node"] == "beta"
    assert node_of(client).operations == {}


async def test_O1_an_old_neuron_without_numbers_is_waited_for_as_long_as_something_may_go(
    start: Start, stack: Any
) -> None:
    from tests.cortex_gateway.fake_neuron import listening

    old = FakeNeuron("alpha")
    old.is_old = True
    old.enforce_memory = True
    old.footprints = {"a": 16_000, "m": 20_000}
    await stack.enter_async_context(listening(old))
    old.have("a")
    old.answer_gate.clear()
    client = await start(old, catalogue=Catalogue(models=(ModelProfile(id="m"), ModelProfile(id="a"))))
    at_work = asyncio.ensure_future(client.chat(model="a"))
    await old.request_arrived.wait()
    waiting = asyncio.ensure_future(client.chat(model="m"))
    async with asyncio.timeout(10):
        while not old.count("POST /models/load"):
            await asyncio.sleep(0.01)
    assert not waiting.done()
    old.answer_gate.set()
    assert (await at_work)[0] == (await waiting)[0] == 200
    old.others_mb = 23_000
    old.models.clear()
    async with client.get("/admin/fleet?refresh=1"):
        pass
    assert (await client.chat(model="m"))[0] == 503


def test_O1_a_load_that_a_poll_knows_of_counts_for_whom_it_is() -> None:
    """The share of the incoming model is not taken off what is free for it."""
    own = node(free_mb=[20_000], operations={"m": Operation(kind="load", since=90.0)})
    found = account("m", own, state(own, catalogue=SIZES))
    assert found is not None and (found.free_mb, found.others_mb) == (20_000, 4_000)
    loads = {"a": ModelLoad(id="a", in_flight=3)}
    assert (
        "a (3 requests at work)"
        in explain(
            "m",
            Hold(node="alpha", reason="busy"),
            state(node(having={"a": "loaded"}, free_mb=[6_000], loads=loads), catalogue=SIZES),
        ).text
    )

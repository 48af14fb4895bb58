"""The lifecycle machine under random orders and random luck: nothing it started is left over, nobody waits in vain.

The world it is played in keeps the books: fetches, engines, drains, retries and admission as the machine's effects
make them, and only such events as that world could send. What the manager must guarantee is played as it is there:
`Stop` ends everything, and its report is the last word of what it ended.
"""

from __future__ import annotations

from pathlib import Path

from cortex_core.errors import ApiError
from cortex_core.fleet import LoadProgress, ModelSpec
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from neuron.daemon.lifecycle import state_machine
from neuron.daemon.lifecycle.state_machine import ABSENT

from tests.neuron.rounds import SHAKEN

SPECS = [ModelSpec("acme/model"), ModelSpec("acme/model", max_model_len=1024)]
REFUSED = ApiError("invalid_request", "no such repository", code="repo_fetch_failed", status=422)
OFFLINE = ApiError("overloaded", "no network", code="repo_fetch_failed", retry_after=10)
BROKEN = ApiError("internal", "broken", code="load_failed")


class World(RuleBasedStateMachine):
    """fetches, engines, retries, drains, stops: how many of each there are now."""

    def __init__(self) -> None:
        super().__init__()
        self.state = ABSENT
        self.fetches = self.retries = self.drains = self.stops = 0
        self.engine: str | None = None  # loading, up, rebuilding
        self.is_open = False
        self.in_flight = 0
        self.loads_waiting = self.unloads_waiting = 0
        self.is_listed = False
        self.last_order: str | None = None

    @initialize(is_up=st.booleans(), in_flight=st.integers(0, 2), is_wanted_away=st.booleans())
    def begin(self, is_up: bool, in_flight: int, is_wanted_away: bool) -> None:
        """Half of the histories begin with a model that serves: what happens to it then takes fewer steps to meet."""
        if is_up:
            self.load(SPECS[0])
            self.fetch("done", 0)
            self.engine_turns(True)
            self.in_flight = in_flight
            if is_wanted_away:
                self.unload()

    def post(self, event: state_machine.Event) -> None:
        self.state, effects = state_machine.decide(self.state, event)
        for effect in effects:
            self.perform(effect)

    def perform(self, effect: state_machine.Effect) -> None:
        match effect:
            case state_machine.StartFetch():
                assert not self.fetches and not self.retries and self.engine is None and not self.stops
                self.fetches += 1
            case state_machine.RetryLater():
                assert not self.fetches and not self.retries
                self.retries += 1
            case state_machine.StartEngine():
                assert self.engine is None and not self.fetches and not self.stops, "two engines of one model"
                self.engine = "loading"
            case state_machine.OpenAdmission():
                assert self.engine is not None
                self.is_open = True
            case state_machine.Drain():
                assert not self.drains
                self.is_open = False
                self.drains += 1
            case state_machine.Stop():
                assert not self.stops, "stopped twice"
                self.stops += 1
                self.is_open = False
                self.fetches = self.retries = self.drains = 0
            case state_machine.AnswerLoads(error):
                assert error is not None or self.engine == "up", "answered as loaded without an engine"
                self.loads_waiting = 0
            case state_machine.AnswerUnloads(error):
                assert error is not None or (self.engine is None and not self.fetches)
                if error is not None:
                    self.last_order = None  # it was refused, and what there is stays
                self.unloads_waiting = 0
            case state_machine.Remember():
                self.is_listed = True
            case state_machine.Disown():
                self.is_listed = False
            case state_machine.Forget():
                assert self.state == ABSENT

    # ------------------------------------------------------------------ orders

    @rule(spec=st.sampled_from(SPECS))
    def load(self, spec: ModelSpec) -> None:
        self.loads_waiting += 1
        self.last_order = "load"
        self.post(state_machine.LoadRequested(spec))

    @rule()
    def unload(self) -> None:
        self.unloads_waiting += 1
        self.last_order = "unload"
        self.post(state_machine.UnloadRequested())

    # ------------------------------------------------------------------ luck

    @precondition(lambda self: self.fetches)
    @rule(outcome=st.sampled_from(["done", "done", "refused", "offline", "progress"]), num_bytes=st.integers(0, 9))
    def fetch(self, outcome: str, num_bytes: int) -> None:
        if outcome == "progress":
            self.post(state_machine.Progressed(LoadProgress("fetching", num_bytes, 9)))
            return
        self.fetches -= 1
        if outcome == "done":
            self.post(state_machine.Fetched(Path("/checkpoint")))
        else:
            self.post(state_machine.FetchFailed(REFUSED if outcome == "refused" else OFFLINE))

    @precondition(lambda self: self.retries)
    @rule()
    def retry(self) -> None:
        self.retries -= 1
        self.post(state_machine.RetryDue())

    @precondition(lambda self: self.engine is not None and not self.stops)
    @rule(luck=st.booleans())
    def engine_turns(self, luck: bool) -> None:
        if self.engine == "up":
            self.engine = "rebuilding"
            self.post(state_machine.EngineDied("killed"))
        elif luck:
            self.engine = "up"
            self.post(state_machine.EngineUp())
        else:
            self.engine = None
            self.in_flight = 0
            self.post(state_machine.EngineFailed(BROKEN))

    @precondition(lambda self: self.is_open and self.state.phase in ("loaded", "recovering"))
    @rule()
    def request_comes(self) -> None:
        self.in_flight += 1

    @precondition(lambda self: self.in_flight)
    @rule()
    def request_ends(self) -> None:
        self.in_flight -= 1

    @precondition(lambda self: self.drains)
    @rule()
    def drain_ends(self) -> None:
        self.drains -= 1
        self.post(state_machine.DrainTimedOut(self.in_flight) if self.in_flight else state_machine.Drained())

    @precondition(lambda self: self.stops)
    @rule()
    def stop_ends(self) -> None:
        self.stops = 0
        self.engine, self.in_flight = None, 0
        self.post(state_machine.Stopped())

    # ------------------------------------------------------------------ the books

    @invariant()
    def nothing_is_unaccounted_for(self) -> None:
        phase = self.state.phase
        working = self.fetches + self.retries
        assert working <= 1
        if phase in ("absent", "failed"):
            assert not working and self.engine is None and not self.drains and not self.stops and not self.in_flight
            assert not self.loads_waiting and not self.unloads_waiting
        elif phase == "fetching":
            assert working == 1 and self.engine is None
        elif phase == "loading":
            assert self.engine == "loading"
        elif phase == "loaded":
            assert self.engine == "up" and self.is_open and not self.loads_waiting
        elif phase == "recovering":
            assert self.engine == "rebuilding"
        else:
            assert phase == "unloading" and self.drains + self.stops == 1, "an unload that nothing will end"
            assert not self.is_open
        if self.loads_waiting:
            assert phase in ("fetching", "loading", "recovering", "unloading")
        if self.unloads_waiting:
            assert phase == "unloading"
        if phase == "loaded":
            assert self.is_listed, "a daemon that dies now would not bring it back"

    @invariant()
    def what_cannot_happen_now_changes_nothing_that_matters(self) -> None:
        """Late words of what has ended never start, open or answer anything in a model that is absent."""
        if self.state == ABSENT:
            for event in (
                state_machine.RetryDue(),
                state_machine.EngineUp(),
                state_machine.Drained(),
                state_machine.Stopped(),
            ):
                assert state_machine.decide(self.state, event) == (self.state, ())

    def teardown(self) -> None:
        """However it stands, it comes to rest, and the last order is what has become of it."""
        for _ in range(40):
            if self.fetches:
                self.fetch("done", 0)
            elif self.retries:
                self.retry()
            elif self.stops:
                self.stop_ends()
            elif self.drains:
                self.in_flight = 0
                self.drain_ends()
            elif self.engine in ("loading", "rebuilding"):
                self.engine_turns(True)
            else:
                break
        assert self.state.phase in ("absent", "failed", "loaded")
        assert not self.loads_waiting and not self.unloads_waiting
        assert (self.state.phase == "loaded") == (self.engine == "up")
        if self.last_order == "unload":
            assert self.state == ABSENT and not self.is_listed


World.TestCase.settings = SHAKEN
test_no_fetch_engine_or_waiter_is_unaccounted_for = World.TestCase

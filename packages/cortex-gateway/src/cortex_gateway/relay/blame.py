"""Requests that end the processes they are given to.

A connection that closes without a byte of answer may be anybody's doing: an operator's, the network's, another
request's. So such a request is asked again, and suspected until it gets an answer. A suspect has a node to itself for
as long as it took the first process to end, and twice that, so that a second end has one cause and nobody else is
taken for it: then it is refused, and so is its body for a while, since clients ask again by themselves. Suspects are
known by their bodies, or each of a client's tries could end one more process. Where several were in the path of a
second end all the same, none is blamed, and each is tried alone for longer.

Most ends are nobody's doing, and then all that were there are suspects: so many turns could take minutes. After a first
end, whoever has waited for a turn for a few seconds goes without one.

Pure but for the clock that it is given.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from cortex_core.errors import ApiError, request_kills_engine

MAX_DEATHS = 2
"""Processes that may end under one request."""
MOST_DEATHS = 4
"""Where it never was alone: then it is refused all the same."""
REMEMBERED_S = 600.0
MAX_REMEMBERED = 256
SHORTEST_TURN_S, LONGEST_TURN_S = 0.5, 5.0
"""How long a suspect is alone; what was at work for longer than the longest when its process ended needs no turn."""
LONGEST_WAIT_S = 4.0
"""How long a suspect of one end waits for its turn; then it shares the node with others."""
TURN_AGAIN = 4.0
"""So many times as long after a second end that may have had several causes."""
MAX_LIVES = 64

Key = tuple[str, int, bytes]


class Life(NamedTuple):
    """One process of a node, from its start to its end; with `engine`, one engine of that process."""

    node: str
    generation: int
    engine: str | None = None


class Body:
    """What a request is known by. digest: None until it is needed, for bodies may be large."""

    __slots__ = ("digest", "model", "num_bytes")

    def __init__(self, model: str, num_bytes: int, digest: bytes | None = None) -> None:
        self.model = model
        self.num_bytes = num_bytes
        self.digest = digest

    @property
    def key(self) -> Key:
        assert self.digest is not None
        return self.model, self.num_bytes, self.digest


class _Record:
    """deaths: of processes under this body. lived_s: how long the last one worked on it before it ended."""

    __slots__ = ("deaths", "is_blamed", "lived_s", "until")

    def __init__(self) -> None:
        self.deaths: set[Life] = set()
        self.lived_s = 0.0
        self.is_blamed = False
        self.until = 0.0

    @property
    def turn_s(self) -> float | None:
        """How long the next try is alone on its node; None needs no turn."""
        if len(self.deaths) < MAX_DEATHS:
            return None if self.lived_s > LONGEST_TURN_S else max(2 * self.lived_s, SHORTEST_TURN_S)
        return TURN_AGAIN * LONGEST_TURN_S


class Trial:
    """One try of a suspect. turn_s: how long it is alone, None where others need not wait for it; turn: what ends
    that time, for whoever keeps time."""

    __slots__ = ("_blame", "body", "life", "turn", "turn_s")

    def __init__(self, blame: Blame, body: Body, life: Life, turn_s: float | None) -> None:
        self._blame = blame
        self.body = body
        self.life = life
        self.turn_s = turn_s
        self.turn: asyncio.TimerHandle | None = None

    def answered(self) -> None:
        """There is an answer: it is none of those."""
        self._blame.clear(self.body)
        self.leave()

    def turn_is_over(self) -> None:
        """It goes on, and others may join it."""
        self._blame.give_turn(self)

    def leave(self) -> None:
        """It ended, however, and no process with it."""
        if self.turn is not None:
            self.turn.cancel()
        self._blame.left(self)


class Blame:
    """Bodies under which processes have ended: `records`. now: seconds of a clock that is never set."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.records: OrderedDict[Key, _Record] = OrderedDict()
        self._lengths: Counter[int] = Counter()
        self._turns: dict[str, Trial] = {}
        self._paths: OrderedDict[Life, set[Trial]] = OrderedDict()
        self._freed: asyncio.Event | None = None

    def needs_digest(self, body: Body) -> bool:
        """Whether a body of this length is remembered, and this one not known yet."""
        return body.digest is None and body.num_bytes in self._lengths

    def check(self, body: Body) -> None:
        """Raises `ApiError` for a body that is blamed."""
        record = self._find(body)
        if record is not None and record.is_blamed:
            raise self.error(body)

    def error(self, body: Body) -> ApiError:
        record = self.records.get(body.key)
        return request_kills_engine(
            body.model,
            len(record.deaths) if record is not None and record.deaths else MAX_DEATHS,
            f"The same request is refused for {REMEMBERED_S / 60:.0f} minutes.",
        )

    # ------------------------------------------------------------------------------------------ tries

    def is_taken(self, body: Body, node: str, waited_s: float = 0.0) -> bool:
        """Whether a suspect that has waited for so long has to wait there until another one's turn is over."""
        if node not in self._turns:
            return False
        record = self._find(body)
        if record is None or record.turn_s is None:
            return False
        return waited_s < LONGEST_WAIT_S or len(record.deaths) >= MAX_DEATHS

    def begin(self, body: Body, life: Life) -> Trial | None:
        """The body is sent to that process. None for one that nobody suspects; whoever calls has asked `is_taken`."""
        record = self._find(body)
        if record is None:
            return None
        trial = Trial(self, body, life, None if life.node in self._turns else record.turn_s)
        self._path(life).add(trial)
        if trial.turn_s is not None:
            self._turns[life.node] = trial
        return trial

    def died(self, body: Body, trial: Trial | None, life: Life, lived_s: float) -> bool:
        """The process ended under the body, `lived_s` after it was sent, without a byte of answer. True where the body
        is to blame."""
        if trial is not None:
            self.give_turn(trial)
        self._forget()
        record = self._record(body)
        record.deaths.add(life)
        record.lived_s = lived_s
        others = [other for other in self._in_path(body, trial, life) if other.body.key != body.key]
        if len(record.deaths) >= (MOST_DEATHS if others else MAX_DEATHS):
            record.is_blamed = True
        self._keep(body, record)
        return record.is_blamed

    def _in_path(self, body: Body, trial: Trial | None, life: Life) -> set[Trial]:
        """Suspects whom `life` had when it ended. Where it is an engine, its process goes on: those who ended with the
        engine leave that one's path for its own."""
        if life.engine is None:
            return self._paths.get(life, set())
        process = self._paths.get(life._replace(engine=None), set())
        if trial is not None:
            self.left(trial)
            self._path(life).add(trial)
        return self._paths.get(life, set()) | {other for other in process if other.body.model == body.model}

    def remember(self, body: Body) -> None:
        """A neuron has found out by itself that the body ends its engine."""
        record = self._record(body)
        record.is_blamed = True
        self._keep(body, record)

    def clear(self, body: Body) -> None:
        record = self.records.get(body.key)
        if record is not None and not record.is_blamed:
            self._drop(body.key)

    def give_turn(self, trial: Trial) -> None:
        if self._turns.get(trial.life.node) is trial:
            del self._turns[trial.life.node]
            if self._freed is not None:
                self._freed.set()
                self._freed = None

    def left(self, trial: Trial) -> None:
        self.give_turn(trial)
        path = self._paths.get(trial.life)
        if path is not None:
            path.discard(trial)
            if not path:
                del self._paths[trial.life]

    def _path(self, life: Life) -> set[Trial]:
        path = self._paths.setdefault(life, set())
        while len(self._paths) > MAX_LIVES:
            self._paths.popitem(last=False)
        return path

    async def freed(self, waited_s: float) -> None:
        """Wait until a turn is over somewhere, or the patience of one that has waited for so long, as it has any."""
        if self._freed is None:
            self._freed = asyncio.Event()
        with suppress(TimeoutError):
            async with asyncio.timeout(LONGEST_WAIT_S - waited_s if waited_s < LONGEST_WAIT_S else None):
                await self._freed.wait()

    # ------------------------------------------------------------------------------------------ memory

    def _find(self, body: Body) -> _Record | None:
        if not self.records or body.digest is None:
            return None
        self._forget()
        return self.records.get(body.key)

    def _record(self, body: Body) -> _Record:
        record = self.records.get(body.key)
        if record is None:
            record = self.records[body.key] = _Record()
            self._lengths[body.num_bytes] += 1
        return record

    def _keep(self, body: Body, record: _Record) -> None:
        record.until = self._now() + REMEMBERED_S
        self.records.move_to_end(body.key)
        if len(self.records) > MAX_REMEMBERED:
            self._drop(next(iter(self.records)))

    def _forget(self) -> None:
        now = self._now()
        while self.records:
            key, record = next(iter(self.records.items()))
            if record.until > now:
                return
            self._drop(key)

    def _drop(self, key: Key) -> None:
        del self.records[key]
        self._lengths[key[1]] -= 1
        self._lengths += Counter()  # those that are zero go

"""The connections of one listener: how many there are, what their clients are at, and who has to go.

Decides and counts; whoever accepts connections and speaks HTTP on them calls it. A connection is

- *idle* while there is no request: it is new, it is kept, or its next head has not ended,
- *receiving* while a request's body is still to come,
- *stalled* while its client does not take what it is sent,
- *working* otherwise: a request is being answered.

When another one comes and there is no room, an idle connection goes, else a receiving one, else one that has been
stalled for a while; never one that is working. Of those it is the oldest of the client that has the most connections,
so that whoever opens many makes way for whoever opens few. And each of them goes when its time is over.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from typing import Literal

State = Literal["idle", "receiving", "stalled", "working"]
STATES: tuple[State, ...] = ("idle", "receiving", "stalled", "working")

Reason = Literal["room", "body", "unread", "idle", "head", "refused", "flood"]
REASONS: tuple[Reason, ...] = ("room", "body", "unread", "idle", "head", "refused", "flood")
"""Why connections were ended here: to make room, one that was idle, in the middle of a body, or unread; without a
request for too long, or unread; a head that did not end; no room and nobody to make any; more control frames than a
client has use for."""

MAX_CLIENTS_TRIED = 32
"""Clients without a connection to give up that are passed over before the oldest of all goes."""
MAX_UNREAD_TRIED = 8
"""Idle connections whose clients have not taken all of their last answer yet that are spared before one is cut."""
NEW_S = 1.0
"""How long one that has not asked for anything yet is given until it goes before those that send bodies: what it asks
may not be read yet."""
STALLED_S = 5.0
"""How long a client must not have read until its connection can go for another."""
SHARES = 16
"""One client has at most all but one of so many shares of the room; the last is for others."""

Close = Callable[[bool], bool]
"""Close a connection and return True, or return False where the kernel still has to be given what was written to it.
With True it is closed all the same."""

GIVEN_UP: tuple[State, ...] = ("idle", "receiving", "stalled")
"""To make room, the first that there is."""
_REASON_TO_MAKE_ROOM: dict[State, Reason] = {"idle": "room", "receiving": "body", "stalled": "unread"}


class Connection:
    """One of them. `state` is what its client is at."""

    __slots__ = ("_client", "_close", "_num_unread", "_request", "_table", "is_in_head", "is_new", "state")

    def __init__(self, table: ConnectionTable, client: _Client, close: Close) -> None:
        self._table = table
        self._client = client
        self._close = close
        self._request: State = "idle"  # what it is at where all that was written is taken
        self._num_unread = 0
        self.state: State = "idle"
        self.is_in_head = False
        self.is_new = True

    def head_began(self) -> None:
        """A byte of a head has come. May be called for each."""
        if self.state == "idle" and not self.is_in_head:
            self._table._head_began(self)

    def works(self, *, is_receiving: bool = False) -> None:
        """A request has come, with all of its body or without."""
        self.is_new = False
        self._request = "receiving" if is_receiving else "working"
        self._settle()

    def rests(self) -> None:
        """Every request is answered."""
        self._request = "idle"
        self._settle()

    def stalls(self) -> None:
        """Something that is written waits for its client; `moves` is called as often."""
        self._num_unread += 1
        self._settle()

    def takes(self) -> None:
        """Its client has taken some of what waits for it."""
        if self.state == "stalled":
            self._table._become(self, "stalled")

    def moves(self) -> None:
        """That does not wait any more."""
        self._num_unread -= 1
        self._settle()

    def _settle(self) -> None:
        state: State = "stalled" if self._num_unread and self._request != "idle" else self._request
        if state != self.state:
            self._table._become(self, state)

    def left(self) -> None:
        """It has ended, for whatever reason. May be called again."""
        self._table._remove(self)

    def flooded(self) -> None:
        """Its client sends what only makes work; whoever speaks with it ends it."""
        self._table.ended["flood"] += 1


_Queue = OrderedDict[Connection, float]
"""Connections in one state, and since when, the oldest first."""


class _Client:
    __slots__ = ("address", "num_open", "queues")

    def __init__(self, address: str) -> None:
        self.address = address
        self.num_open = 0
        self.queues: dict[State, _Queue] = {state: OrderedDict() for state in STATES}


class ConnectionTable:
    """limit: connections at once. idle_s: how long one may be without a request. head_s: how long a head may take from
    its first byte. unread_s: how long a client may take nothing of what waits for it, 0 for ever; what waits in the
    kernel is the kernel's to end. clock: in seconds, monotonic."""

    def __init__(
        self, limit: int, *, idle_s: float, head_s: float, clock: Callable[[], float], unread_s: float = 0.0
    ) -> None:
        self.limit = limit
        self.ended: dict[Reason, int] = dict.fromkeys(REASONS, 0)
        self.num_accepted = 0
        self.idle_s = idle_s
        self.head_s = head_s
        self.unread_s = unread_s
        self._clock = clock
        self._most_of_one = limit - limit // SHARES
        self._open: set[Connection] = set()
        self._queues: dict[State, _Queue] = {state: OrderedDict() for state in STATES}
        self._heads: _Queue = OrderedDict()
        self._clients: dict[str, _Client] = {}
        self._by_size: dict[int, OrderedDict[_Client, None]] = {}

    @property
    def num_open(self) -> int:
        return len(self._open)

    def num_in(self, state: State) -> int:
        return len(self._queues[state])

    # ------------------------------------------------------------------ coming and going

    def admit(self, address: str, close: Close) -> Connection | None:
        """A connection has been accepted. None: it has to be refused, as all that could go for it are at work."""
        client = self._clients.get(address)
        if client is not None and client.num_open >= self._most_of_one:
            has_room = self.make_room(client)
        else:
            has_room = len(self._open) < self.limit or self.make_room()
        if not has_room:
            self.ended["refused"] += 1
            return None
        client = self._clients.get(address)
        if client is None:
            client = self._clients[address] = _Client(address)
        self._resize(client, 1)
        connection = Connection(self, client, close)
        self._open.add(connection)
        self._enlist(connection)
        self.num_accepted += 1
        return connection

    def make_room(self, client: _Client | None = None, *, of: Sequence[State] = GIVEN_UP) -> bool:
        """Close one that is in one of these states, of the client if one is given. False: there is none."""
        for tried in range(MAX_UNREAD_TRIED + 1):
            connection = self._victim(client, of)
            if connection is None:
                return False
            must = tried == MAX_UNREAD_TRIED or connection.state != "idle"
            if self._end(connection, _REASON_TO_MAKE_ROOM[connection.state], force=must):
                return True
        return False

    def close_overdue(self, at_most: int) -> bool:
        """Close so many of those that have been idle, in the middle of a head, or unread for too long. Returns whether
        there may be more."""
        num_tried = 0
        now = self._clock()
        queues: tuple[tuple[Reason, _Queue, float], ...] = (
            ("head", self._heads, self.head_s),
            ("idle", self._queues["idle"], self.idle_s),
            ("unread", self._queues["stalled"], self.unread_s),
        )
        for reason, queue, limit_s in queues:
            while queue and limit_s > 0:
                connection, since = next(iter(queue.items()))
                if now - since < limit_s:
                    break
                if num_tried == at_most:
                    return True
                num_tried += 1
                self._end(connection, reason, force=False)
        return False

    def close_idle(self) -> None:
        """Close all that are idle: the server ends."""
        for connection in list(self._queues["idle"]):
            self._end(connection, None, force=False)

    def _victim(self, client: _Client | None, states: Sequence[State]) -> Connection | None:
        newcomer = None
        for state in states:
            if state == "stalled" and newcomer is not None:
                break
            queue = client.queues[state] if client is not None else self._queues[state]
            if not queue:
                continue
            since_longest = next(iter(queue))
            connection = since_longest if client is not None else self._of_whoever_has_most(state)
            if state == "stalled":
                stalled = (each for each in (connection, since_longest) if self._clock() - queue[each] >= STALLED_S)
                return next(stalled, None)
            if connection.is_new and self._clock() - queue[connection] < NEW_S:
                newcomer = connection
                continue
            return connection
        return newcomer

    def _of_whoever_has_most(self, state: State) -> Connection:
        """The oldest in this state, in which there are some, of the client that has the most connections."""
        queue = self._queues[state]
        tried = 0
        for size in sorted(self._by_size, reverse=True):
            for client in self._by_size[size]:
                if own := client.queues[state]:
                    return next(iter(own))
                tried += 1
                if tried >= MAX_CLIENTS_TRIED:
                    return next(iter(queue))
        return next(iter(queue))

    def _end(self, connection: Connection, reason: Reason | None, *, force: bool) -> bool:
        if not connection._close(force):
            self._delist(connection)
            self._enlist(connection)  # as the youngest: its client may still read
            return False
        self._remove(connection)
        if reason is not None:
            self.ended[reason] += 1
        return True

    # ------------------------------------------------------------------ what connections say

    def _head_began(self, connection: Connection) -> None:
        if connection in self._open:
            connection.is_in_head = True
            self._heads[connection] = self._clock()

    def _become(self, connection: Connection, state: State) -> None:
        if connection in self._open:
            self._delist(connection)
            connection.state = state
            self._enlist(connection)

    def _remove(self, connection: Connection) -> None:
        if connection not in self._open:
            return
        self._open.discard(connection)
        self._delist(connection)
        client = connection._client
        self._resize(client, -1)
        if client.num_open == 0:
            del self._clients[client.address]

    def _enlist(self, connection: Connection) -> None:
        now, state = self._clock(), connection.state
        self._queues[state][connection] = connection._client.queues[state][connection] = now

    def _delist(self, connection: Connection) -> None:
        state = connection.state
        del self._queues[state][connection], connection._client.queues[state][connection]
        if connection.is_in_head:
            connection.is_in_head = False
            del self._heads[connection]

    def _resize(self, client: _Client, change: int) -> None:
        """Keep clients by how many connections they have."""
        if client.num_open:
            group = self._by_size[client.num_open]
            del group[client]
            if not group:
                del self._by_size[client.num_open]
        client.num_open += change
        if client.num_open:
            self._by_size.setdefault(client.num_open, OrderedDict())[client] = None


def client_of(address: object) -> str:
    """Whom a peer's address stands for: a host, or the /64 of an IPv6 one, of which a host has as many as it likes."""
    host = str(address[0]) if isinstance(address, tuple) and address else ""
    if ":" not in host:
        return host
    try:
        number = ip_address(host.partition("%")[0])
    except ValueError:
        return host
    mapped = getattr(number, "ipv4_mapped", None)
    return str(mapped) if mapped is not None else number.exploded[:19]

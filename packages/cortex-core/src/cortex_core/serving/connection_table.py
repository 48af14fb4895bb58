"""The connections of one listener: how many there are, which of them wait for a request, and who has to go.

Decides and counts; whoever accepts connections and speaks HTTP on them calls it. A connection is *idle* while no
request of it is being worked on: it is new, it is kept, or its next head has not ended yet. Only idle connections are
ever closed from here. When another one comes and there is no room, it is the oldest of the client that has the most
connections, so that whoever opens many makes way for whoever opens few; and each of them when its time is over.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from ipaddress import ip_address
from typing import Literal

Reason = Literal["room", "idle", "head", "refused", "flood"]
REASONS: tuple[Reason, ...] = ("room", "idle", "head", "refused", "flood")
"""Why connections were ended here: to make room, without a request for too long, a head that did not end, no room and
nobody to make any, more control frames than a client has use for."""

MAX_CLIENTS_TRIED = 32
"""Clients without an idle connection that are passed over before the oldest idle one of all goes."""
MAX_UNREAD_TRIED = 8
"""Connections whose clients have not taken all of their last answer yet that are spared before one of them is cut."""

Close = Callable[[bool], bool]
"""Close a connection and return True, or return False where its client has not taken all of its last answer yet. With
True it is closed all the same."""


class Connection:
    """One of them."""

    __slots__ = ("_client", "_close", "_table", "is_idle", "is_in_head")

    def __init__(self, table: ConnectionTable, client: _Client, close: Close) -> None:
        self._table = table
        self._client = client
        self._close = close
        self.is_idle = True
        self.is_in_head = False

    def head_began(self) -> None:
        """A byte of a head has come. May be called for each."""
        if self.is_idle and not self.is_in_head:
            self._table._head_began(self)

    def became_busy(self) -> None:
        """A request has come."""
        if self.is_idle:
            self._table._became_busy(self)

    def became_idle(self) -> None:
        """Every request is answered."""
        if not self.is_idle:
            self._table._became_idle(self)

    def left(self) -> None:
        """It has ended, for whatever reason. May be called again."""
        self._table._remove(self)

    def flooded(self) -> None:
        """Its client sends what only makes work; whoever speaks with it ends it."""
        self._table.ended["flood"] += 1


class _Client:
    """idle: its idle connections, oldest first."""

    __slots__ = ("address", "idle", "num_open")

    def __init__(self, address: str) -> None:
        self.address = address
        self.num_open = 0
        self.idle: OrderedDict[Connection, None] = OrderedDict()


class ConnectionTable:
    """limit: connections at once. idle_s: how long one may be without a request. head_s: how long a head may take from
    its first byte. clock: in seconds, monotonic."""

    def __init__(self, limit: int, *, idle_s: float, head_s: float, clock: Callable[[], float]) -> None:
        self.limit = limit
        self.ended: dict[Reason, int] = dict.fromkeys(REASONS, 0)
        self.num_accepted = 0
        self.idle_s = idle_s
        self.head_s = head_s
        self._clock = clock
        self._open: set[Connection] = set()
        self._idle: OrderedDict[Connection, float] = OrderedDict()  # and since when, the oldest first
        self._heads: OrderedDict[Connection, float] = OrderedDict()
        self._clients: dict[str, _Client] = {}
        self._by_size: dict[int, OrderedDict[_Client, None]] = {}

    @property
    def num_open(self) -> int:
        return len(self._open)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    # ------------------------------------------------------------------ coming and going

    def admit(self, address: str, close: Close) -> Connection | None:
        """A connection has been accepted. None: it has to be refused, as all the others are at work."""
        if len(self._open) >= self.limit and not self.make_room():
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

    def make_room(self) -> bool:
        """Close one idle connection. False: there is none."""
        for tried in range(MAX_UNREAD_TRIED + 1):
            victim = self._victim()
            if victim is None:
                return False
            if self._end(victim, "room", force=tried == MAX_UNREAD_TRIED):
                return True
        return False

    def close_overdue(self) -> None:
        """Close whatever has been idle, or in the middle of a head, for too long."""
        now = self._clock()
        queues: tuple[tuple[Reason, OrderedDict[Connection, float], float], ...]
        queues = (("head", self._heads, self.head_s), ("idle", self._idle, self.idle_s))
        for reason, queue, limit_s in queues:
            while queue:
                connection, since = next(iter(queue.items()))
                if now - since < limit_s:
                    break
                self._end(connection, reason, force=False)

    def close_idle(self) -> None:
        """Close all that are idle: the server ends."""
        for connection in list(self._idle):
            self._end(connection, None, force=False)

    def _victim(self) -> Connection | None:
        if not self._idle:
            return None
        tried = 0
        for size in sorted(self._by_size, reverse=True):
            for client in self._by_size[size]:
                if client.idle:
                    return next(iter(client.idle))
                tried += 1
                if tried >= MAX_CLIENTS_TRIED:
                    return next(iter(self._idle))
        return next(iter(self._idle))

    def _end(self, connection: Connection, reason: Reason | None, *, force: bool) -> bool:
        if not connection._close(force):
            self._delist(connection)
            self._enlist(connection)  # as the youngest: it has been idle for as long as it takes to read
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

    def _became_busy(self, connection: Connection) -> None:
        if connection in self._open:
            self._delist(connection)

    def _became_idle(self, connection: Connection) -> None:
        if connection in self._open:
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
        connection.is_idle = True
        self._idle[connection] = self._clock()
        connection._client.idle[connection] = None

    def _delist(self, connection: Connection) -> None:
        connection.is_idle = connection.is_in_head = False
        self._idle.pop(connection, None)
        self._heads.pop(connection, None)
        connection._client.idle.pop(connection, None)

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

"""Which connection goes when there is no room: an idle one, the oldest of whoever has most, and never one at work."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest
from cortex_core.serving import connection_table
from cortex_core.serving.connection_table import (
    MAX_UNREAD_TRIED,
    NEW_S,
    STALLED_S,
    STATES,
    Connection,
    ConnectionTable,
    client_of,
)
from hypothesis import given
from hypothesis import strategies as st


class Table(ConnectionTable):
    """With a clock of its own, and the names of the connections that it has closed."""

    def __init__(self, limit: int = 4, *, idle_s: float = 75, head_s: float = 30, unread_s: float = 0) -> None:
        self.now = 0.0
        self.closed: list[str] = []
        self.unread: set[str] = set()
        super().__init__(limit, idle_s=idle_s, head_s=head_s, unread_s=unread_s, clock=lambda: self.now)

    def come(self, name: str, client: str = "192.0.2.1") -> Connection:
        connection = self.admit(client, lambda force: self._close(name, force))
        assert connection is not None
        return connection

    def _close(self, name: str, force: bool) -> bool:
        if name in self.unread and not force:
            return False
        self.closed.append(name)
        return True


def test_O2_the_oldest_idle_connection_makes_room() -> None:
    table = Table()
    first, *_ = [table.come(name) for name in "abcd"]
    first.works()
    table.come("e")
    assert (table.closed, table.num_open, table.ended["room"]) == (["b"], 4, 1)
    first.rests()
    for name in "fghi":
        table.come(name)
    assert table.closed == ["b", "c", "d", "e", "a"], "it has been idle since after they came"


def test_O2_who_is_at_work_is_never_closed_and_another_is_refused() -> None:
    table = Table()
    for name in "abcd":
        table.come(name).works()
    table.now = 10_000
    table.close_overdue(9)
    assert table.admit("192.0.2.9", lambda force: True) is None
    assert (table.closed, table.num_open, table.ended["refused"]) == ([], 4, 1)


def test_O2_who_has_most_connections_makes_room_for_who_has_few() -> None:
    table = Table(limit=6)
    table.come("balancer", "192.0.2.7")
    for number in range(20):
        table.come(f"flood {number}", "198.51.100.1")
    table.come("another", "192.0.2.8")
    assert "balancer" not in table.closed and "another" not in table.closed
    assert table.closed == [f"flood {number}" for number in range(16)]


def test_O2_clients_without_an_idle_connection_are_passed_over() -> None:
    table = Table(limit=6)
    for number in range(4):
        table.come(f"at work {number}", "198.51.100.1").works()
    table.come("idle", "192.0.2.7")
    table.come("also idle", "192.0.2.8")
    table.come("new", "192.0.2.9")
    assert table.closed == ["idle"]


def test_O2_who_sends_a_body_makes_room_after_the_idle_and_before_who_does_not_read() -> None:
    table = Table(limit=5)
    unread, slow, working, idle, quick = [table.come(name) for name in ("unread", "slow", "working", "idle", "quick")]
    table.now = NEW_S
    for each in (unread, working):
        each.works()
    for each in (slow, quick):
        each.works(is_receiving=True)
    unread.stalls()
    quick.works()
    slow.stalls()
    slow.moves()
    table.come("a").works()
    assert (table.closed, table.ended["room"]) == (["idle"], 1)
    table.come("b").works()
    assert (table.closed[1:], table.ended["body"]) == (["slow"], 1)
    assert table.admit("192.0.2.9", lambda force: True) is None, "who reads slowly has some time"
    table.now += STALLED_S
    table.come("c").works()
    assert (table.closed[2:], table.ended["unread"]) == (["unread"], 1)
    assert table.admit("192.0.2.9", lambda force: True) is None and not {"working", "quick"} & set(table.closed)
    assert idle.state == "idle"


def test_O2_who_takes_some_of_its_answer_is_not_unread() -> None:
    table = Table(limit=9, unread_s=100)
    slow, deaf = table.come("slow"), table.come("deaf")
    for each in (slow, deaf):
        each.works()
        each.stalls()
    table.now = 99
    slow.takes()
    deaf.stalls()  # more that waits: nothing is taken by that
    deaf.moves()
    table.now = 100
    table.close_overdue(9)
    assert (table.closed, table.ended["unread"]) == (["deaf"], 1)
    slow.moves()
    table.now = 1000
    table.close_overdue(9)
    assert table.closed == ["deaf"] and slow.state == "working"


def test_O2_who_has_just_come_does_not_make_room_for_bodies_that_do_not_come() -> None:
    """Many are accepted at once, before the first of them is heard."""
    table = Table(limit=4)
    for name in "abcd":
        table.come(name).works(is_receiving=True)
    for name in "efgh":
        table.come(name)
    assert table.closed == ["a", "b", "c", "d"]
    table.come("i")
    assert table.closed[4:] == ["e"], "where there are no others"
    table.now = NEW_S
    table.come("j").works(is_receiving=True)
    table.come("k")
    assert table.closed[5:] == ["f", "g"], "and whoever had its time"


def test_O2_what_waits_in_the_kernel_is_ended_by_the_kernel() -> None:
    """It knows whether anything is taken; nobody here does while megabytes wait in a socket."""
    table = Table(limit=1, unread_s=100)
    slow = table.come("slow")
    slow.works()
    slow.stalls()
    table.unread = {"slow"}
    table.now = 1000
    table.close_overdue(9)
    assert table.closed == [] and slow.state == "stalled"
    table.now += STALLED_S
    table.come("new", "192.0.2.9")
    assert (table.closed, table.ended["unread"]) == (["slow"], 1), "and where there is no room it goes all the same"


def test_O2_who_does_not_read_makes_room_even_if_it_has_few_and_who_has_most_just_began() -> None:
    table = Table(limit=3)
    deaf, *flood = [table.come("deaf", "192.0.2.7"), table.come("a"), table.come("b")]
    deaf.works()
    deaf.stalls()
    table.now = STALLED_S
    for each in flood:
        each.works()
        each.stalls()
    table.come("new", "192.0.2.9")
    assert table.closed == ["deaf"]


def test_O2_one_client_leaves_a_share_for_others_even_if_all_it_has_is_at_work() -> None:
    table = Table(limit=64)
    for number in range(60):
        table.come(str(number), "198.51.100.1").works()
    assert table.admit("198.51.100.1", lambda force: True) is None, "one sixteenth is for others"
    idle = table.come("idle", "192.0.2.200")
    assert table.admit("198.51.100.1", lambda force: True) is None and not table.closed, "who are not to make room"
    idle.left()
    others = [table.come(f"other {number}", f"192.0.2.{number}") for number in range(4)]
    for each in others:
        each.works()
    assert (table.num_open, table.closed) == (64, [])
    assert table.admit("192.0.2.200", lambda force: True) is None


def test_O2_a_client_that_has_its_share_makes_room_for_itself() -> None:
    table = Table(limit=64)
    connections = [table.come(str(number), "198.51.100.1") for number in range(60)]
    for each in connections[:59]:
        each.works()
    table.come("idle", "192.0.2.7")
    table.come("60", "198.51.100.1").works()
    assert (table.closed, table.num_open) == (["59"], 61)


def test_O2_a_client_that_still_reads_its_answer_is_spared_while_others_are_there() -> None:
    table = Table()
    for name in "abcd":
        table.come(name)
    table.unread = {"a", "b"}
    table.come("e")
    assert table.closed == ["c"]


def test_O2_where_nobody_reads_one_is_cut_all_the_same() -> None:
    table = Table(limit=MAX_UNREAD_TRIED * 2)
    names = [str(number) for number in range(table.limit)]
    for name in names:
        table.come(name, f"192.0.2.{name}")
    table.unread = set(names)
    table.come("new")
    assert len(table.closed) == 1 and table.num_open == table.limit


def test_O2_idle_connections_and_heads_that_do_not_end_are_closed_in_time() -> None:
    table = Table(limit=9, idle_s=75, head_s=30)
    slow, kept, busy = table.come("slow"), table.come("kept"), table.come("busy")
    busy.works()
    table.now = 20
    slow.head_began()
    table.now = 49
    slow.head_began()  # another byte of the same head
    table.close_overdue(9)
    assert table.closed == []
    table.now = 50
    table.close_overdue(9)
    assert (table.closed, table.ended["head"]) == (["slow"], 1)
    kept.works()
    kept.rests()
    table.now = 124
    table.close_overdue(9)
    assert table.closed == ["slow"]
    table.now = 125
    table.close_overdue(9)
    assert (table.closed, table.ended["idle"], table.num_open) == (["slow", "kept"], 1, 1)


def test_O2_of_many_that_are_overdue_so_many_are_closed_at_once() -> None:
    table = Table(limit=400, idle_s=75)
    for number in range(200):
        table.come(str(number), f"192.0.2.{number}")
    table.now = 75
    assert (table.close_overdue(150), len(table.closed)) == (True, 150)
    assert (table.close_overdue(150), len(table.closed)) == (False, 200)


def test_a_connection_that_has_left_is_not_closed_and_says_nothing_more() -> None:
    table = Table()
    connection = table.come("a")
    connection.left()
    connection.left()
    connection.head_began()
    connection.works()
    connection.rests()
    table.now = 1000
    table.close_overdue(9)
    assert (table.num_open, table.num_in("idle"), table.closed) == (0, 0, [])


@pytest.mark.parametrize(
    ("address", "client"),
    [
        (("192.0.2.1", 4711), "192.0.2.1"),
        (("2001:db8:1:2:3:4:5:6", 4711, 0, 0), "2001:0db8:0001:0002"),
        (("2001:db8:1:2:ffff::1", 1, 0, 0), "2001:0db8:0001:0002"),
        (("::ffff:192.0.2.1", 4711, 0, 0), "192.0.2.1"),
        (("fe80::1%eth0", 4711, 0, 2), "fe80:0000:0000:0000"),
        ("", ""),
        ("/run/socket", ""),
    ],
)
def test_a_client_is_a_host_or_a_network_of_ipv6(address: object, client: str) -> None:
    assert client_of(address) == client


deeds = st.tuples(
    st.sampled_from(["come", "busy", "receiving", "stalled", "moves", "idle", "head", "leave", "wait"]),
    st.integers(0, 9),
    st.integers(0, 3),
)


@given(st.lists(deeds, max_size=120), st.integers(1, 6))
def test_O2_whatever_happens_the_bound_holds_and_the_books_agree(
    history: list[tuple[str, int, int]], limit: int
) -> None:
    table = Table(limit)
    alive: dict[str, Connection] = {}
    busy: set[str] = set()
    unread: list[str] = []
    for number, (deed, which, client) in enumerate(history):
        names = sorted(alive)
        name = names[which % len(names)] if names else ""
        if deed == "come":
            fresh = str(number)
            connection = table.admit(f"192.0.2.{client}", lambda force, fresh=fresh: table._close(fresh, force))
            if connection is None:
                at_work = {name for name in busy if alive[name].state in ("working", "stalled")}
                assert at_work == set(alive) and len(busy) == limit
            else:
                alive[fresh] = connection
        elif deed == "wait":
            table.now += which * 10
            table.close_overdue(9)
        elif name and deed == "leave":
            alive.pop(name).left()
            busy.discard(name)
        elif name and deed in ("busy", "receiving"):
            alive[name].works(is_receiving=deed == "receiving")
            busy.add(name)
        elif name and deed == "stalled":
            alive[name].stalls()
            unread.append(name)
        elif deed == "moves":
            if name in unread:
                unread.remove(name)
                alive[name].moves()
        elif name and deed == "idle":
            alive[name].rests()
            busy.discard(name)
        elif name:
            alive[name].head_began()
        gone = [alive[name] for name in alive if name in table.closed]
        assert not [each for each in gone if each.state == "working"], "who is at work is never closed"
        alive = {name: connection for name, connection in alive.items() if name not in table.closed}
        busy &= set(alive)
        assert table.num_open == len(alive) <= limit
        assert table.num_in("idle") == len(alive) - len(busy)
        assert table.num_in("stalled") == len([name for name in busy if name in unread])
        assert sum(table.num_in(state) for state in STATES) == table.num_open


def lines_run(deed: Any) -> int:
    """How many lines of the table's code run in it."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        if frame.f_code.co_filename != connection_table.__file__:
            return None
        count += event == "line"
        return trace

    sys.settrace(trace)
    try:
        deed()
    finally:
        sys.settrace(None)
    return count


@pytest.mark.parametrize("kind", ["one client", "many clients", "many clients at work"])
def test_O2_room_is_made_in_as_many_steps_among_many_as_among_few(kind: str) -> None:
    def steps(limit: int) -> int:
        table = Table(limit)
        for number in range(limit):
            connection = table.come(str(number), "198.51.100.1" if kind == "one client" else f"client {number}")
            if kind == "many clients at work" and number < limit - 1:
                connection.works()
        return lines_run(lambda: table.come("new", "192.0.2.1"))

    assert steps(4000) == steps(2000)

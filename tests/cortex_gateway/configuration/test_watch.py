"""When a file counts as changed, on real files and under any sequence of looks."""

from __future__ import annotations

import os
from pathlib import Path

from cortex_gateway.configuration.watch import Prints, Settling, prints_of
from hypothesis import given
from hypothesis import strategies as st


def prints(number: int | None) -> Prints:
    return (("file", None if number is None else (0, number, 0, 0, 0)),)


@given(st.lists(st.sampled_from([None, 1, 2, 3]), max_size=30))
def test_only_what_two_looks_agree_on_is_read_and_only_once(looks: list[int | None]) -> None:
    settling = Settling()
    settling.take(prints(1))
    taken: int | None = 1
    before: int | str | None = "nothing yet"
    for look in looks:
        is_due = settling.is_due(prints(look))
        assert is_due == (look == before and look != taken)
        if is_due:
            taken = look
        before = look


@given(st.lists(st.sampled_from([None, 1, 2, 3]), max_size=20), st.sampled_from([None, 1, 2, 3]))
def test_whatever_came_before_what_lasts_is_read_in_the_end(looks: list[int | None], last: int | None) -> None:
    settling = Settling()
    read = [look for look in (*looks, last, last) if settling.is_due(prints(look))]
    assert read[-1:] == [last] or (read and read[-1] == last)


def test_every_way_to_change_a_file_shows(tmp_path: Path) -> None:
    target, other, link = tmp_path / "a", tmp_path / "b", tmp_path / "link"
    target.write_text("one")
    other.write_text("two")
    link.symlink_to(target)
    seen = [prints_of([str(link)])]

    def changed() -> bool:
        seen.append(prints_of([str(link)]))
        return seen[-1] != seen[-2]

    assert not changed()
    target.write_text("longer than before")
    assert changed()
    renamed = tmp_path / "new"  # what editors do
    renamed.write_text("longer than before")
    renamed.replace(target)
    assert changed()
    swapped = tmp_path / "swap"  # what configuration management does
    swapped.symlink_to(other)
    swapped.replace(link)
    assert changed()
    stat = other.stat()
    other.write_text("owt")
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, same time: cp -p, rsync
    assert changed()
    other.unlink()
    assert changed() and seen[-1] == ((str(link), None),)
    assert not changed()

"""Files of an operator: what stands in the place of one neither holds its reader nor fills the memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from cortex_core.config import MAX_CONFIG_BYTES, ConfigError, read_regular, read_text
from cortex_core.secret_references import MAX_SECRET_BYTES, resolve_secret


@contextmanager
def a_fifo(path: Path) -> Iterator[None]:
    """One that nobody writes to. In the end, whoever waits for that is let go."""
    os.mkfifo(path)
    try:
        yield
    finally:
        with suppress(OSError):  # nobody reads it
            os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))


def fault_of(read: Callable[[], object]) -> str:
    """What `read` raises. A thread of its own, as it may not come back."""
    faults: list[str] = []

    def run() -> None:
        try:
            read()
        except (ConfigError, ValueError) as exc:
            faults.append(str(exc))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "it waits"
    return faults[0]


def test_H3_a_fifo_or_a_device_in_the_place_of_a_file_is_refused_at_once(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with a_fifo(file):
        assert "no regular file" in fault_of(lambda: read_text(file))
        assert "no regular file" in fault_of(lambda: resolve_secret(f"file:{file}", {}))
    assert "no regular file" in fault_of(lambda: resolve_secret("file:/dev/null", {}))
    assert "Is a directory" in fault_of(lambda: read_text(tmp_path))


@pytest.mark.parametrize("limit", [MAX_CONFIG_BYTES, MAX_SECRET_BYTES])
def test_H3_a_file_is_read_up_to_its_limit_and_not_beyond(tmp_path: Path, limit: int) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"#" * limit)
    assert len(read_regular(file, limit=limit)) == limit
    with file.open("ab") as more:
        more.write(b"#")
    with pytest.raises(OSError, match=f"longer than {limit} bytes"):
        read_regular(file, limit=limit)


def test_H3_what_is_too_long_is_said_by_name(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with file.open("wb") as sparse:
        sparse.truncate(2**40)  # takes no room, and would take all memory
    assert f"{file}: cannot be read" in fault_of(lambda: read_text(file))
    assert f"longer than {MAX_SECRET_BYTES} bytes" in fault_of(lambda: resolve_secret(f"file:{file}", {}))


def test_lines_end_as_they_are_written_anywhere(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"a = 1\r\nb = 2\rc = 3\n")
    assert read_text(file) == "a = 1\nb = 2\nc = 3\n"

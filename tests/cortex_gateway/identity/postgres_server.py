"""A PostgreSQL of our own, in a folder of the test's and on a Unix socket: no port, no password, no host's server."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path
from urllib.parse import quote

from cortex_gateway.identity.postgres_store import LOOK, PostgresStore

from .fake_clock import FakeClock


class PostgresAt(PostgresStore):
    """A store whose database has the date of `date`, its gateway's clock unless another one is given."""

    def __init__(self, url: str, clock: FakeClock, date: FakeClock | None = None) -> None:
        super().__init__(url, clock)
        self._date = date or clock

    @property
    def _look(self) -> str:
        return LOOK.format(wall=self._date.wall_ms())


class PostgresMissing(Exception):
    """Why there is none here."""


def _binary(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        found = next((str(path) for path in sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))), None)
    if found is None:
        raise PostgresMissing(f"PostgreSQL's server is not installed ({name})")
    return found


class PostgresServer:
    """Started by the constructor, which raises `PostgresMissing`; each store gets a database of its own."""

    def __init__(self) -> None:
        initdb, pg_ctl = _binary("initdb"), _binary("pg_ctl")
        # The server refuses to run as root; a folder below a private one would be out of its user's reach.
        self._user = None if os.getuid() else "postgres"
        if self._user is not None:
            try:
                pwd.getpwnam(self._user)
            except KeyError:
                raise PostgresMissing("PostgreSQL does not run as root, and there is no user `postgres`") from None
        self._folder = Path(tempfile.mkdtemp(prefix="cortex-pg-"))
        if self._user is not None:
            shutil.chown(self._folder, self._user)
        self._pg_ctl = pg_ctl
        self._data = self._folder / "data"
        self._num_databases = 0
        self._run(initdb, "--pgdata", str(self._data), "--auth", "trust", "--username", "cortex", "--no-sync")
        options = f"-c listen_addresses='' -c unix_socket_directories='{self._folder}' -c fsync=off"
        self._run(
            pg_ctl, "--pgdata", str(self._data), "--wait", "--options", options, "--log", str(self._folder / "log"),
            "start",
        )  # fmt: skip

    def _run(self, *command: str) -> None:
        # Output to a file: the server would keep a pipe open for ever.
        with (self._folder / "output").open("ab") as output:
            done = subprocess.run(
                command, user=self._user, cwd=self._folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                timeout=120,
            )  # fmt: skip
        if done.returncode:
            raise PostgresMissing(f"{command[0]} failed:\n{(self._folder / 'output').read_text()}")

    def new_url(self) -> str:
        self._num_databases += 1
        name = f"cortex{self._num_databases}"
        self._run(_binary("createdb"), "--host", str(self._folder), "--username", "cortex", name)
        return f"postgresql://cortex@/{name}?host={quote(str(self._folder), safe='')}"

    def new_store(self, clock: FakeClock | None = None) -> PostgresStore:
        """clock: also what the database believes the date to be."""
        return PostgresStore(self.new_url()) if clock is None else PostgresAt(self.new_url(), clock)

    def restart(self) -> None:
        self._run(self._pg_ctl, "--pgdata", str(self._data), "--wait", "--mode", "immediate", "restart")

    def stop(self) -> None:
        self._run(self._pg_ctl, "--pgdata", str(self._data), "--wait", "--mode", "immediate", "stop")
        shutil.rmtree(self._folder)

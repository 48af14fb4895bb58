"""What the door decided about a request, for whoever answers it."""

from __future__ import annotations

from typing import NamedTuple

from cortex_gateway.http.asgi import RawHeaders, Scope

_KEY = "cortex.admission"


class Admission(NamedTuple):
    """cors: headers for every answer. needs_key: a key has to be valid whatever is asked for, since a page of another
    origin asks."""

    cors: RawHeaders
    needs_key: bool = False


ADMITTED = Admission([])


def admit(scope: Scope, admission: Admission) -> None:
    scope[_KEY] = admission


def admission_of(scope: Scope) -> Admission:
    return scope.get(_KEY, ADMITTED)  # type: ignore[no-any-return]

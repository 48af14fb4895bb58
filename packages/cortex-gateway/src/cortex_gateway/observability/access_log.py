"""One line of JSON per request, whatever became of it."""

from __future__ import annotations

import logging

import msgspec

log = logging.getLogger("cortex_gateway.access")

_encode = msgspec.json.Encoder().encode


class AccessRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """Fields that do not apply are left out. Times are milliseconds; `status` 499 is a client that hung up.
    `key` and `account` are ids, never secrets.

    `outcome`: ok, rejected (an error of the gateway's own), upstream_error (an error of the neuron's, passed on),
    upstream_failed (no or no usable answer), timeout, client_gone, shutdown, error (a fault of the gateway).
    """

    id: str
    method: str
    path: str
    status: int
    outcome: str
    duration_ms: float
    model: str | None = None
    resolved: str | None = None
    node: str | None = None
    route: str | None = None
    stream: bool = False
    attempts: int = 0
    ttft_ms: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    client: str | None = None
    key: str | None = None
    account: str | None = None
    error: str | None = None


def write(record: AccessRecord, level: int = logging.INFO) -> None:
    if log.isEnabledFor(level):
        # Not `log.log`: it walks the stack to find its caller, which costs as much as all the rest.
        log.handle(logging.LogRecord(log.name, level, "", 0, _encode(record).decode(), None, None))

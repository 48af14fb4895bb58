"""Messages between a gateway and the processes that read its bodies."""

from __future__ import annotations

from cortex_core.conversation import Request
from cortex_core.errors import ApiError
from cortex_gateway.bodies.messages import (
    PREFIX_BYTES,
    Done,
    Facts,
    Job,
    Order,
    Read,
    Refused,
    Rename,
    Renamed,
    Result,
    Shown,
    Translate,
    Translated,
    decode_done,
    decode_order,
    encode_message,
)
from cortex_gateway.identity.estimate import Asked


def test_H13_a_refusal_travels_whole() -> None:
    error = ApiError("invalid_request", "no", code="c", param="p", status=422, retry_after=3, extras={"n": 1})
    came = decode_done(encode_message(Done(Refused.of(error)))[4:]).result
    assert isinstance(came, Refused)
    back = came.error()
    for name in ("kind", "message", "code", "param", "status", "retry_after", "extras"):
        assert getattr(back, name) == getattr(error, name)


def sent(job: Job) -> Job:
    message = encode_message(Order(1.5, job))
    assert int.from_bytes(message[:PREFIX_BYTES], "little") == len(message) - PREFIX_BYTES
    order = decode_order(message[PREFIX_BYTES:])
    assert order.cpu_s == 1.5
    return order.job


def test_jobs_that_look_alike_are_told_apart() -> None:
    jobs: list[Job] = [
        Read(5),
        Rename(5, "theirs"),
        Translate(5, "messages", "m", "theirs", extensions=True, drops_attribution=False),
    ]
    assert [sent(job) for job in jobs] == jobs


def test_results_come_back_as_they_were_found() -> None:
    results: list[Result] = [
        Facts("m", True, Asked(9, 1, 2), "session", b"\xff\x00", (3, 6), Shown(b"{}", True, False)),
        Facts("m", None, None, None, b"", None),
        Renamed(7),
        Translated(7, Request("m", stream=True)),
        Refused("request_too_large", "", is_out_of_memory=True),
    ]
    for result in results:
        payload = encode_message(Done(result, is_last=True))[PREFIX_BYTES:]
        assert decode_done(payload) == Done(result, is_last=True)


def test_a_length_is_as_long_whatever_follows() -> None:
    for size in (1, 1000, 70_000):
        message = encode_message(Done(Refused("internal", "x" * size)))
        assert int.from_bytes(message[:PREFIX_BYTES], "little") == len(message) - PREFIX_BYTES > size

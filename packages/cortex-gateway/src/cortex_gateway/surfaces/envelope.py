"""The little the gateway needs to know of a body: which model, and whether to stream."""

from __future__ import annotations

import re

import msgspec
from cortex_core.dialects.limits import MAX_MODEL_NAME
from cortex_core.errors import ApiError, invalid


class Envelope(msgspec.Struct, frozen=True):
    """A partial decode: every other field is skipped, and the body travels on as it came."""

    model: str
    stream: bool | None = None


MAX_FIELDS = 10_000
"""At the top of a body whose fields are looked at one by one. No dialect has a hundred."""

_decoder = msgspec.json.Decoder(Envelope)
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def read_envelope(body: bytes) -> Envelope:
    """Raises `ApiError` 400, and nothing else, whatever the bytes."""
    try:
        envelope = _decoder.decode(body)
        if not body.isascii():
            body.decode()
    except msgspec.ValidationError as exc:
        raise _wrong_shape(str(exc)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise invalid(f"The body is not valid JSON: {exc}", code="invalid_json") from None
    except RecursionError:
        raise invalid("The body is nested too deeply.", code="invalid_json") from None
    if not envelope.model:
        raise _missing_model()
    if len(envelope.model) > MAX_MODEL_NAME:
        raise invalid(f"model: no name is longer than {MAX_MODEL_NAME} characters", param="model")
    return envelope


_MODEL = re.compile(rb'"model"\s*+:\s*+("(?:[^"\\]++|\\.)*+")', re.DOTALL)
_KEY = re.compile(rb'[\s,{]*+"(?:[^"\\]++|\\.)*+"\s*+:\s*+', re.DOTALL)


def top_fields(body: bytes) -> dict[str, msgspec.Raw]:
    """The fields at the top of a body that `read_envelope` has read; of one that is given twice, the last.

    Raises `ApiError` 400 where there are more than `MAX_FIELDS`.
    """
    fields = _fields(body)
    if len(fields) > MAX_FIELDS:
        raise ApiError(
            "invalid_request",
            f"The body has {len(fields)} fields at its top; at most {MAX_FIELDS} may be.",
            code="too_many_fields",
            extras={"fields": len(fields), "max_fields": MAX_FIELDS},
        )
    return fields


def model_place(body: bytes, fields: dict[str, msgspec.Raw]) -> tuple[int, int] | None:
    """Where the model's name stands, quotes included. None where a field is given twice: of that, only the last is
    known.

    The fields are gone through by their lengths. Those that are given twice are not all among `fields`, so that their
    lengths do not lead to the body's end.
    """
    place: tuple[int, int] | None = None
    position = 0
    for key, value in fields.items():
        found = _KEY.match(body, position)
        if found is None:
            return None
        position = found.end() + memoryview(value).nbytes
        if key == "model":
            place = found.end(), position
    return place if body[position:].strip() == b"}" else None


def with_model(body: bytes, name: str) -> bytes:
    """The body with another model in it, every other byte as it was. For bodies that `read_envelope` has read.

    Raises `ApiError` where the model cannot be found at once, and the body has too many fields to look through.
    """
    encoded = msgspec.json.encode(name)
    first = _MODEL.search(body)
    if first is not None:
        renamed = body[: first.start(1)] + encoded + body[first.end(1) :]
        if _decoder.decode(renamed).model == name:  # it is the last, too
            return renamed
    fields = top_fields(body)
    place = model_place(body, fields)
    if place is not None:
        return body[: place[0]] + encoded + body[place[1] :]
    rest = b",".join(
        b"%b:%b" % (msgspec.json.encode(key), bytes(value)) for key, value in fields.items() if key != "model"
    )
    return b'{"model":%b%b}' % (encoded, b"," + rest if rest else b"")


def _missing_model() -> ApiError:
    return invalid("model: field required", param="model", code="missing_model_field")


def _wrong_shape(fault: str) -> ApiError:
    message, _, path = fault.partition(" - at `")
    path = path.rstrip("`").removeprefix("$").removeprefix(".")
    if path == "stream":
        return invalid(f"stream: {message}", param="stream", code="invalid_type")
    if path == "model":
        return invalid(f"model: {message}", param="model", code="invalid_type")
    if "`model`" in message:
        return _missing_model()
    return invalid(f"The body must be a JSON object: {message}", code="invalid_type")

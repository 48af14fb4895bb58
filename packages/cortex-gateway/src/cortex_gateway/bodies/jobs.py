"""The jobs themselves: bodies in, facts or other bodies out. Pure; linear in the body but for what it asks for.

It runs where it may take as long as its budget says, so it reads a body as often as is simplest.
"""

from __future__ import annotations

import msgspec
from cortex_core.conversation import Request, ToolDefinition
from cortex_core.errors import ApiError
from cortex_core.gateway_config import PromptFiltersSection

from cortex_gateway.bodies.messages import Facts, Job, Read, Rename, Renamed, Result, Shown, Translate, Translated
from cortex_gateway.identity.estimate import asked_of_fields
from cortex_gateway.observability.redaction import clean_body, without_images
from cortex_gateway.placement.affinity import BLOCK_BYTES, MAX_BLOCKS
from cortex_gateway.placement.session_hints import read_hints
from cortex_gateway.surfaces.anthropic import SURFACES as ANTHROPIC_SURFACES
from cortex_gateway.surfaces.envelope import model_place, read_envelope, top_fields, with_model
from cortex_gateway.surfaces.openai import SURFACES as OPENAI_SURFACES
from cortex_gateway.translation.translation import translation_of

MAX_REPEATED_BYTES = 2**20
"""What answers repeat of a request (tools, instructions, metadata): it goes into events, and so back to the gateway."""

SURFACES = {surface.name: surface for surface in (*OPENAI_SURFACES, *ANTHROPIC_SURFACES)}


def run(job: Job, body: bytes) -> tuple[Result, bytes]:
    """What came of it, and the body that goes with that. Raises `ApiError` where the body is bad."""
    match job:
        case Read():
            return read(body, job.shown_bytes), b""
        case Rename():
            renamed = with_model(body, job.name)
            return Renamed(len(renamed)), renamed
        case Translate():
            return translate(job, body)


def read(body: bytes, shown_bytes: int = 0) -> Facts:
    """Gone through twice: to check it, and for its fields; the rest is found in these."""
    envelope = read_envelope(body)
    fields = top_fields(body)
    session, prompt = read_hints(fields, BLOCK_BYTES * MAX_BLOCKS)
    return Facts(
        model=envelope.model,
        stream=envelope.stream,
        asked=asked_of_fields(fields, len(body)),
        session=session,
        prompt=prompt,
        model_at=model_place(body, fields),
        shown=_shown(body, shown_bytes) if shown_bytes else None,
    )


def _shown(body: bytes, num_bytes: int) -> Shown:
    plain = without_images(body)
    return Shown(clean_body(plain[:num_bytes]), is_cut=len(plain) > num_bytes, is_shortened=len(plain) < len(body))


def translate(job: Translate, body: bytes) -> tuple[Translated, bytes]:
    filters = PromptFiltersSection(claude_code_attribution=job.drops_attribution)
    translation = translation_of(SURFACES[job.surface], body, job.asked, filters)
    written = translation.body(job.model, extensions=job.extensions)
    assert translation.request is not None  # what passes is not sent here
    request = _without_prompt(translation.request)
    num_repeated = len(msgspec.msgpack.encode(request))
    if num_repeated > MAX_REPEATED_BYTES:
        raise ApiError(
            "request_too_large",
            f"Beside its prompt the request holds {num_repeated} bytes that its answer repeats (tools, instructions, "
            f"metadata); at most {MAX_REPEATED_BYTES} may be.",
            code="request_too_large",
            extras={"bytes": num_repeated, "max_bytes": MAX_REPEATED_BYTES},
        )
    return Translated(len(written), request), written


def _without_prompt(request: Request) -> Request:
    return msgspec.structs.replace(
        request,
        turns=(),
        prompts=(),
        tools=tuple(_name_of(tool) for tool in request.tools),
        response_format=None,
        template_kwargs={},
    )


def _name_of(tool: ToolDefinition) -> ToolDefinition:
    return msgspec.structs.replace(tool, description=None, parameters=None)

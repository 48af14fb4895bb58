"""Model ids: `[scheme:]org/name`, and `file:PATH` for a local checkpoint folder."""

from __future__ import annotations

import msgspec

FILE_SCHEME = "file"
DEFAULT_SCHEME = "huggingface"


class ModelIdError(ValueError):
    """An id that is none. The message says what is wrong with it."""


class ModelId(msgspec.Struct, frozen=True):
    """scheme is empty for a bare id; for `file` the path is in `path` and org and name are empty."""

    scheme: str
    org: str = ""
    name: str = ""
    path: str = ""

    @property
    def repo(self) -> str:
        return f"{self.org}/{self.name}"

    def __str__(self) -> str:
        if self.scheme == FILE_SCHEME:
            return f"{FILE_SCHEME}:{self.path}"
        return f"{self.scheme}:{self.repo}" if self.scheme else self.repo


def parse_model_id(text: str) -> ModelId:
    """Split at the first colon. Raises `ModelIdError`."""
    if not text:
        raise ModelIdError("the model id is empty")
    scheme, colon, rest = text.partition(":")
    if not colon:
        scheme, rest = "", text
    elif not scheme:
        raise ModelIdError(f"`{text}`: the scheme before the colon is empty")
    elif "/" in scheme:
        raise ModelIdError(f"`{text}`: the scheme must not contain a slash")
    if scheme == FILE_SCHEME:
        if not rest:
            raise ModelIdError(f"`{text}`: no path after `{FILE_SCHEME}:`")
        return ModelId(FILE_SCHEME, path=rest)
    org, slash, name = rest.partition("/")
    if not slash:
        raise ModelIdError(f"`{text}`: a model id has the form org/name")
    if not org:
        raise ModelIdError(f"`{text}`: the organisation before the slash is empty")
    if not name:
        raise ModelIdError(f"`{text}`: the name after the slash is empty")
    if ":" in name:
        raise ModelIdError(f"`{text}`: the name must not contain a colon")
    if "/" in name or ".." in (org, name) or "\\" in rest or "\0" in rest:
        raise ModelIdError(f"`{text}`: a model id has the form org/name")
    return ModelId(scheme, org=org, name=name)

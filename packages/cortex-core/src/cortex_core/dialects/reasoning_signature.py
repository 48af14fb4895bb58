"""Reasoning that a client carries from turn to turn without reading it: Anthropic's `signature` of a thinking block
whose text was omitted, and the `encrypted_content` of a responses reasoning item.

Both vendors encrypt; a local server has nothing to hide from its own client, so the text travels as base64. What other
servers wrote is not ours to read and counts as nothing.
"""

from __future__ import annotations

import base64
import binascii

_PREFIX = "cortex1."


def wrap(text: str) -> str:
    return _PREFIX + base64.b64encode(text.encode("utf-8", "replace")).decode()


def unwrap(carried: str | None) -> str | None:
    """The text of `wrap`, None for anything else."""
    if carried is None or not carried.startswith(_PREFIX):
        return None
    try:
        return base64.b64decode(carried[len(_PREFIX) :], validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return None

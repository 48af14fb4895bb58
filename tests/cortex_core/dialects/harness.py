"""Requests that a dialect refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from cortex_core.conversation import Request
from cortex_core.errors import ApiError


def refused_by(parse: Callable[..., Request], **fields: Any) -> ApiError:
    """The error names the field in its message too: not every dialect's envelope has a place for it."""
    with pytest.raises(ApiError) as caught:
        parse(**fields)
    assert caught.value.status == 400
    assert caught.value.param is not None
    assert caught.value.message.startswith(caught.value.param), "the message names the field"
    return caught.value

"""Ids of requests, and the status of one whose client hung up."""

from __future__ import annotations

import os

CLIENT_GONE_STATUS = 499
"""Not an HTTP status: what the log and the metrics call a client that hung up (nginx's convention)."""


def new_request_id() -> str:
    return "req_" + os.urandom(12).hex()

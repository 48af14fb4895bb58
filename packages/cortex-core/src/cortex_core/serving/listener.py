"""Socket options that connections inherit from the listener that accepts them."""

from __future__ import annotations

import socket


def prepare(listener: socket.socket, *, write_timeout_s: float) -> socket.socket:
    """The listener, whose connections send at once what they are given, and are cut by the kernel (Linux) when what was
    written to them is not taken for `write_timeout_s`; 0: never.

    That covers both data that nobody acknowledges and a window that stays shut: a client that does not read holds a
    connection and a few buffers no longer than that.
    """
    if listener.family in (socket.AF_INET, socket.AF_INET6):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        user_timeout = getattr(socket, "TCP_USER_TIMEOUT", None)
        if write_timeout_s > 0 and user_timeout is not None:
            listener.setsockopt(socket.IPPROTO_TCP, user_timeout, int(write_timeout_s * 1000))
    return listener

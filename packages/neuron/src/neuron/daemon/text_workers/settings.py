"""Settings of a model's text workers, as the daemon gives them."""

from __future__ import annotations

import msgspec


class TextSettings(msgspec.Struct, frozen=True):
    """max_workers: processes that work on one model's text at once. cpu_s: processor seconds of a short job.
    memory_bytes: of one worker, beyond what its model's tokenizer takes. drops_attribution: see `MessagesDialect`."""

    max_workers: int = 4
    cpu_s: float = 5.0
    memory_bytes: int = 1024 * 2**20
    drops_attribution: bool = True

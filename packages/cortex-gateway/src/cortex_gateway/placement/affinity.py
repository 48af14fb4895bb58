"""Affinity of conversations to nodes: sessions by their key, prompts by their beginning. Bounded, and only ever a hint.

A neuron keeps the KV cache of recent prompts, so the same conversation is answered sooner where its last turn was.
A request that names its session is remembered by that; any other by a chain of hashes over its prompt, one per
block, so that the longest common beginning is found by looking up the chain (as vLLM's block hashes do).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Literal, Protocol

import msgspec

BLOCK_BYTES = 1024
MAX_BLOCKS = 128
"""The first 128 KiB of a prompt are compared; a share is a share of those."""
MAX_SESSIONS = 8192
MAX_PREFIXES = 32_768
MAX_NODES = 4
"""How many nodes one prompt block is remembered for, the latest first."""

Kind = Literal["session", "prefix"]


class Hints(Protocol):
    """What a request says of itself, computed when asked. cache_salt: those with different ones know nothing of each
    other."""

    @property
    def cache_salt(self) -> str: ...

    def session(self) -> str | None:
        """The key of its conversation, if it names one."""

    def prompt(self) -> bytes:
        """Its prompt, without what changes from turn to turn."""


class Shares(msgspec.Struct, frozen=True):
    """What share (0…1) of a request each node already knows, and how that is known."""

    by_node: Mapping[str, float] = {}
    kind: Kind = "prefix"


UNKNOWN = Shares()


class Affinity:
    """Memory of one gateway: which node was last given which session and which prompt beginnings."""

    def __init__(
        self,
        *,
        max_sessions: int = MAX_SESSIONS,
        max_prefixes: int = MAX_PREFIXES,
        block_bytes: int = BLOCK_BYTES,
        max_blocks: int = MAX_BLOCKS,
    ) -> None:
        self._sessions: OrderedDict[tuple[str, str, str], str] = OrderedDict()
        self._prefixes: OrderedDict[int, tuple[str, ...]] = OrderedDict()
        self._max_sessions = max_sessions
        self._max_prefixes = max_prefixes
        self._block_bytes = block_bytes
        self._max_blocks = max_blocks

    def __len__(self) -> int:
        return len(self._sessions) + len(self._prefixes)

    def shares(self, model: str, hints: Hints) -> Shares:
        """Where a request is known. A known session is known whole; its prompt is then not looked at."""
        session = hints.session()
        if session is not None:
            node = self._sessions.get((model, hints.cache_salt, session))
            if node is not None:
                return Shares({node: 1.0}, "session")
        chain = self._chain(model, hints)
        matched: dict[str, int] = {}
        alive: set[str] | None = None
        for number, block in enumerate(chain, 1):
            nodes = self._prefixes.get(block, ())
            alive = set(nodes) if alive is None else alive.intersection(nodes)
            if not alive:
                break
            for node in alive:
                matched[node] = number
        return Shares({node: count / len(chain) for node, count in matched.items()}, "prefix") if matched else UNKNOWN

    def record(self, model: str, hints: Hints, node: str, known: Shares = UNKNOWN) -> None:
        """The request was sent to `node`. known: what `shares` said of it, so that nothing is computed twice."""
        session = hints.session()
        if session is not None:
            key = (model, hints.cache_salt, session)
            self._sessions[key] = node
            self._sessions.move_to_end(key)
            while len(self._sessions) > self._max_sessions:
                self._sessions.popitem(last=False)
            if known.kind == "session":
                return
        for block in self._chain(model, hints):
            nodes = self._prefixes.get(block, ())
            if not nodes or nodes[0] != node:
                self._prefixes[block] = (node, *(other for other in nodes if other != node))[:MAX_NODES]
            self._prefixes.move_to_end(block)
        while len(self._prefixes) > self._max_prefixes:
            self._prefixes.popitem(last=False)

    def _chain(self, model: str, hints: Hints) -> list[int]:
        """One hash per whole block, each over all before it. Python's hash is keyed per process: a hint needs no more,
        and no client can aim at a collision."""
        prompt, size = hints.prompt(), self._block_bytes
        chain: list[int] = []
        link = hash((model, hints.cache_salt))
        for start in range(0, min(len(prompt) // size, self._max_blocks) * size, size):
            link = hash((link, prompt[start : start + size]))
            chain.append(link)
        return chain

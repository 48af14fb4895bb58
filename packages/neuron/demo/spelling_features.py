"""Embeddings that learn what tokens have in common, so that what one spelling teaches serves all that share it.

A token's embedding is trained as the sum of a part of its own and of parts it shares: with tokens of the same word
(` hello`, `hello`, `Hello`), with tokens that have the same character in the same place from the start or from the
end, and with tokens of the same length or case. Only the sum is exported; the model that results is an ordinary one.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

MAX_CHARACTERS = 8


def features_of(token: str) -> list[tuple[object, ...]]:
    """Return the names of what a token of the byte-level vocabulary shares with others."""
    characters = token[1:] if token.startswith("Ġ") and len(token) > 1 else token
    found: list[tuple[object, ...]] = [("length", min(len(characters), MAX_CHARACTERS))]
    if characters != token:
        found.append(("space",))
    if characters.isalpha() and characters.isascii():
        found.append(("word", characters.lower()))
        if not characters.islower():
            found.append(("upper",) if characters.isupper() else ("capitalised",))
    for place, character in enumerate(characters):
        if place < MAX_CHARACTERS:
            found.append(("from start", place, character))
        if len(characters) - 1 - place < MAX_CHARACTERS:
            found.append(("from end", len(characters) - 1 - place, character))
    return found


class SharedEmbedding:
    """Trains `weight` [V, E] as `own + membership @ shared`; `parameters` are what an optimiser steps.

    The gradient of a sum is known, so the model goes on using one plain parameter: `spread_gradient` hands its gradient
    to both parts before an optimiser's step, and `materialise` writes their sum back after it.
    """

    def __init__(self, weight: nn.Parameter, tokenizer: Tokenizer) -> None:
        added = tokenizer.get_added_tokens_decoder()
        index: dict[tuple[object, ...], int] = {}
        entries: list[tuple[int, int]] = []
        for token, id_ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
            if id_ not in added:
                entries += [(id_, index.setdefault(feature, len(index))) for feature in features_of(token)]
        pairs = torch.tensor(entries).T
        size = (weight.shape[0], len(index))
        ones = torch.ones(len(entries))
        with torch.sparse.check_sparse_tensor_invariants(True):
            self._membership = torch.sparse_coo_tensor(pairs, ones, size).coalesce()
            self._transposed = torch.sparse_coo_tensor(pairs.flip(0), ones, size[::-1]).coalesce()
        self._weight = weight
        self.own = nn.Parameter(weight.detach().clone())
        self.shared = nn.Parameter(torch.zeros(len(index), weight.shape[1]))

    def spread_gradient(self) -> None:
        """Give the gradient of the sum to its parts."""
        gradient = self._weight.grad
        if gradient is None:
            raise ValueError("there is no gradient to spread: call backward first")
        self.own.grad = gradient
        self.shared.grad = torch.sparse.mm(self._transposed, gradient)

    @torch.no_grad()
    def materialise(self) -> None:
        """Write the sum of the parts to the model's weight."""
        self._weight.copy_(self.own + torch.sparse.mm(self._membership, self.shared))

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint needs beside the weight."""
        return {"own": self.own.detach(), "shared": self.shared.detach()}

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` returned."""
        self.own.copy_(state["own"])
        self.shared.copy_(state["shared"])
        self.materialise()

"""Embeddings that start with a notion of spelling, so that copying and reversing need not be learnt token by token."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from torch import Tensor

MAX_CHARACTERS = 8


def spelling_embeddings(tokenizer: Tokenizer, size: int, seed: int) -> Tensor:
    """Return embeddings [vocabulary, size] of unit length that superpose codes of each token's characters.

    Every byte has a random code; a random rotation marks its place counted from the start, another its place counted
    from the end. A leading space is a direction of its own and takes no place, so ` hello` and `hello` differ in that
    direction only. A random part of each token stays.
    """
    generator = torch.Generator().manual_seed(seed)

    def random_units(*shape: int) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)

    def rotations() -> Tensor:
        return torch.linalg.qr(torch.randn(MAX_CHARACTERS, size, size, generator=generator)).Q

    from_start, from_end, space = rotations(), rotations(), random_units(size)
    codes: dict[str, Tensor] = {}
    added = tokenizer.get_added_tokens_decoder()
    embeddings = random_units(tokenizer.get_vocab_size(), size)
    for token, id_ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if id_ in added:
            continue
        characters = token[1:] if token.startswith("Ġ") and len(token) > 1 else token
        spelled = torch.zeros(size)
        for place, character in enumerate(characters):
            code = codes.setdefault(character, random_units(size))
            if place < MAX_CHARACTERS:
                spelled += from_start[place] @ code
            if len(characters) - 1 - place < MAX_CHARACTERS:
                spelled += from_end[len(characters) - 1 - place] @ code
        embeddings[id_] = torch.nn.functional.normalize(spelled, dim=0) + 0.4 * embeddings[id_]
        if characters != token:
            embeddings[id_] += 0.5 * space
    return torch.nn.functional.normalize(embeddings, dim=-1)

"""Stop sequences: how many there may be and how long, in every dialect."""

from __future__ import annotations

from typing import Any

from cortex_core.dialects import limits
from cortex_core.dialects.json_body import wrong_type
from cortex_core.errors import invalid


def read_stop_sequences(sequences: list[Any], path: str) -> tuple[str, ...]:
    """Each once, in the order given. Raises `ApiError`."""
    if len(sequences) > limits.MAX_STOP_SEQUENCES:
        raise invalid(f"{path}: at most {limits.MAX_STOP_SEQUENCES} sequences, got {len(sequences)}", param=path)
    for index, sequence in enumerate(sequences):
        place = f"{path}[{index}]"
        if type(sequence) is not str:
            raise wrong_type(place, "a string", sequence)
        if not sequence:
            raise invalid(f"{place}: must not be empty", param=place)
        if len(sequence) > limits.MAX_STOP_CHARACTERS:
            what = f"at most {limits.MAX_STOP_CHARACTERS} characters, got {len(sequence)}"
            raise invalid(f"{place}: {what}", param=place)
    num_characters = sum(map(len, sequences))
    if num_characters > limits.MAX_ALL_STOP_CHARACTERS:
        what = f"at most {limits.MAX_ALL_STOP_CHARACTERS} characters together, got {num_characters}"
        raise invalid(f"{path}: {what}", param=path)
    return tuple(dict.fromkeys(sequences))

"""Digest of a checkpoint: equal on two hosts whose files are equal, and different where they differ in anything that
answers depend on.

Weights are not read for it: they have gigabytes, and a load would take twice as long. Of each file the header, which
names every tensor with its dtype, shape and place, and samples all over its data are taken. Whoever trains a model
changes nearly every number of the matrices that they train.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from neuron.checkpoint.files import open_file, read_file

_TEXT_FILES = frozenset(
    (
        "config.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "generation_config.json",
        "chat_template.json",
        "chat_template.jinja",
    )
)
_NUM_SAMPLES = 64
_SAMPLE_BYTES = 4096


def checkpoint_digest(folder: Path, names: Iterable[str], weight_files: Iterable[str]) -> str:
    """32 hexadecimal digits. names: of the folder's files, of which those are read that say how text becomes tokens and
    tokens answers.

    Raises `CheckpointError` as `files.open_file` does, `OSError`.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(_TEXT_FILES.intersection(names)):
        content = read_file(folder / name)
        digest.update(b"%b %d\n" % (name.encode(), len(content)))
        digest.update(content)
    for name in sorted(weight_files):
        _add_weights(digest, folder / name)
    return digest.hexdigest()


def _add_weights(digest: hashlib.blake2b, path: Path) -> None:
    """The name is left out: it is what a cache of downloads calls the file."""
    descriptor = open_file(path)
    try:
        size = os.fstat(descriptor).st_size
        header_bytes = min(8 + int.from_bytes(os.pread(descriptor, 8, 0), "little"), size)
        digest.update(b"weights %d\n" % size)
        digest.update(os.pread(descriptor, header_bytes, 0))
        span = max(size - header_bytes - _SAMPLE_BYTES, 0)
        for index in range(_NUM_SAMPLES):
            digest.update(os.pread(descriptor, _SAMPLE_BYTES, header_bytes + span * index // (_NUM_SAMPLES - 1)))
    finally:
        os.close(descriptor)

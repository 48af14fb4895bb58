"""The files of a GGUF checkpoint: one, or the splits of one, and which of a folder's files a load means.

Names are compared as whole tags: `q8_0` is no part of `mmproj-X-Q8_0.gguf`, nor `f16` of `X-BF16.gguf`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

SUFFIX = ".gguf"
MAX_SPLITS = 1_000

# `name-00001-of-00003.gguf`, numbered from 1 (`llama_split_path` of llama.cpp).
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})$")
# Beside models lie encoders of images (`mmproj-…`), drafts of multi-token prediction (`mtp-…`), and statistics
# (`imatrix.gguf`, `X.imatrix.gguf`); a model made with the latter may name them in the midst of its name.
_NO_MODEL = re.compile(r"mmproj|^mtp[-_.]|^imatrix|imatrix$")
_SEPARATORS = re.compile(r"[-_.]")


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A model among the files of a folder. files: names relative to the folder, splits in their order; tag: how its
    weights are stored, as its name says (`Q4_K_M`, `UD-Q4_K_XL`); missing: splits that are not there."""

    files: tuple[str, ...]
    tag: str
    missing: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.files[0]


def is_gguf(name: str | Path) -> bool:
    return str(name).lower().endswith(SUFFIX)


def is_gguf_file(path: Path) -> bool:
    """Whether a checkpoint's path is that of a GGUF file, and not of a folder. Looks at the disk."""
    return is_gguf(path) and not path.is_dir()


def splits_of(name: str) -> tuple[str, ...]:
    """Names of all splits of the checkpoint that a file belongs to, in their order; its own where it is whole."""
    split = _SPLIT.search(_stem(name))
    if split is None:
        return (name,)
    count = int(split[2])
    if not 1 <= int(split[1]) <= count <= MAX_SPLITS:
        return (name,)
    base = name[: -len(SUFFIX)][: -len(split[0])]
    return tuple(f"{base}-{number:05d}-of-{count:05d}{name[-len(SUFFIX) :]}" for number in range(1, count + 1))


def models_among(names: Iterable[str]) -> list[GgufModel]:
    """The models among files, by name; names: relative to the folder, with `/`."""
    there = {name for name in names if is_gguf(name) and not _NO_MODEL.search(_stem(name).lower())}
    sets = {splits_of(name) for name in there}
    return [
        GgufModel(files, _tag(files[0]), tuple(name for name in files if name not in there)) for files in sorted(sets)
    ]


def matching(models: Sequence[GgufModel], quant: str) -> list[GgufModel]:
    """Those of a tag: the same, else the same but for `UD-` in front, else with the same letters and digits, else with
    `quant` as a part that begins where a word does. Several are for the caller to refuse."""
    wanted = quant.lower()
    for test in (
        lambda model: model.tag.lower() == wanted,
        lambda model: model.tag.lower().removeprefix("ud-") == wanted,
        lambda model: _SEPARATORS.sub("", model.tag.lower()) == _SEPARATORS.sub("", wanted),
        lambda model: re.search(rf"(?<![a-z0-9]){re.escape(wanted)}", _stem(model.name).lower()) is not None,
    ):
        found = [model for model in models if test(model)]
        if found:
            return found
    return []


def _tag(name: str) -> str:
    """The last token of a name after a dash or, where that holds more, a dot; with a `UD` before it."""
    stem = _SPLIT.sub("", _stem(name))
    head, _, last = stem.rpartition("-")
    last = last.rpartition(".")[2]
    return f"UD-{last}" if head.rpartition("-")[2].upper() == "UD" else last


def _stem(name: str) -> str:
    return name.rsplit("/", 1)[-1][: -len(SUFFIX)]

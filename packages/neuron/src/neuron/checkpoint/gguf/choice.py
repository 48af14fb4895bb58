"""The choice of one GGUF model among the files of a folder or a repository."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from neuron.checkpoint.errors import CheckpointError
from neuron.checkpoint.gguf.files import GgufModel, matching, models_among


class NoSuchQuant(CheckpointError):
    """No file, or more than one, is meant by what a load asks for; `facts` list the candidates."""

    kind = "quant_not_found"


def chosen_model(names: Iterable[str], quant: str | None) -> GgufModel:
    """The one model that `quant` means or, without one, the only model there is; `names`: relative, with `/`.

    Raises `NoSuchQuant` where none or several match, and `CheckpointError` where a split of the one is not there.
    """
    models = models_among(names)
    found = matching(models, quant) if quant else models
    if len(found) > 1:
        asked = f"quant `{quant}` means" if quant else "without a `quant`, a load means"
        raise NoSuchQuant(f"{asked} any of {len(found)} GGUF models", facts=_facts(found, quant))
    if not found:
        raise NoSuchQuant(
            f"no GGUF model of quant `{quant}` is there{_hint(models, quant)}"
            if quant and models
            else "no GGUF model is there",
            facts=_facts(models, quant),
        )
    model = found[0]
    if model.missing:
        raise CheckpointError(
            f"{len(model.missing)} of {len(model.files)} splits are not there", file=model.name, tensors=model.missing
        )
    return model


def _facts(models: list[GgufModel], quant: str | None) -> dict[str, object]:
    return {"requested": quant, "available": [model.name for model in models]}


def _hint(models: list[GgufModel], quant: str) -> str:
    tags = {model.tag.lower(): model.tag for model in models}
    near = difflib.get_close_matches(quant.lower(), sorted(tags), n=1, cutoff=0.0)
    return f"; the nearest is `{tags[near[0]]}`" if near else ""

"""Preflight of a checkpoint before anything is downloaded or started: refuse early, with the facts.

Pure functions over file names and `config.json`. Every refusal is a 422 whose code (and `kind`) names the cause. What
is in the other files is for `inspection` to find.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec
from cortex_core.errors import ApiError
from cortex_core.fleet import DeviceInfo, ModelSpec

from neuron.checkpoint.config import read_config, refuse_quantised
from neuron.checkpoint.errors import CheckpointError, printable
from neuron.checkpoint.families import family_of
from neuron.checkpoint.files import INDEX_FILE
from neuron.checkpoint.hyperparameters import check_values, is_complete
from neuron.checkpoint.sharding import check_division

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
_SMALL_FILES = frozenset(
    (
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "chat_template.json",
        "preprocessor_config.json",
        INDEX_FILE,
        *_TOKENIZER_FILES,
    )
)

_TENSORS_NAMED = 8

LayoutKind = Literal["dense", "gguf", "mixed", "diffusers", "empty"]


class Layout(msgspec.Struct, frozen=True):
    """What a repository or folder holds. `mixed` has safetensors and GGUF: the former are served."""

    kind: LayoutKind
    safetensors: tuple[str, ...] = ()
    gguf: tuple[str, ...] = ()
    is_sharded: bool = False


def classify(names: Iterable[str]) -> Layout:
    """From file names alone (with their folders); weights count only at the top level."""
    files = set(names)
    top = {name for name in files if "/" not in name}
    gguf = tuple(sorted(name for name in files if name.lower().endswith(".gguf")))
    safetensors = tuple(sorted(name for name in top if name.endswith(".safetensors")))
    kind: LayoutKind
    if "model_index.json" in top:
        kind = "diffusers"
    elif safetensors:
        kind = "mixed" if gguf else "dense"
    else:
        kind = "gguf" if gguf else "empty"
    return Layout(kind, safetensors, gguf, INDEX_FILE in top)


def is_small_file(name: str) -> bool:
    """Configuration, tokenizer and template files: fetched first and always."""
    return name in _SMALL_FILES or ("/" not in name and name.endswith(".jinja"))


def world_size_of(spec: ModelSpec) -> int:
    """Processes of the group: as asked for, or as many as the split names."""
    if spec.tensor_parallel is not None:
        return spec.tensor_parallel
    return len(spec.tensor_split) if isinstance(spec.tensor_split, tuple) else 1


def check_spec(spec: ModelSpec, devices: Sequence[DeviceInfo]) -> None:
    """What the request alone rules out. Raises `ApiError` 422."""
    if spec.devices is not None:
        known = {device.index for device in devices}
        absent = [index for index in spec.devices if index not in known]
        if absent:
            raise refusal(
                "device_not_found",
                f"Device {absent[0]} does not exist here; this host has "
                + (f"devices {sorted(known)}." if known else "no accelerator: leave `devices` out to use its CPU."),
                model_id=spec.model_id,
                requested=list(spec.devices),
                available=sorted(known),
            )


def check_layout(spec: ModelSpec, names: Iterable[str]) -> Layout:
    """Whether what the repository holds can be served as asked. Raises `ApiError` 422."""
    names = list(names)
    layout = classify(names)
    tensor_parallel = world_size_of(spec)
    if layout.kind == "empty":
        found = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".h5", ".onnx")))
        hint = f" It holds {found[0]}, but only safetensors weights are read." if found else ""
        raise refusal("empty_repo", f"`{spec.model_id}` has no weights.{hint}", model_id=spec.model_id)
    if layout.kind in ("gguf", "diffusers") and tensor_parallel > 1:
        raise refusal(
            "tp_requires_safetensors",
            f"`{spec.model_id}` has no safetensors language model, which tensor parallelism needs.",
            model_id=spec.model_id,
            tp_size=tensor_parallel,
            gguf_quants=list(layout.gguf),
            suggestion="use the repository with the original safetensors weights",
        )
    if layout.kind == "diffusers":
        raise refusal("unsupported_layout", f"`{spec.model_id}` is a diffusion pipeline.", model_id=spec.model_id)
    if layout.kind == "gguf":
        if spec.quant:
            _check_quant_exists(spec, layout)
        raise refusal(
            "gguf_unsupported",
            f"`{spec.model_id}` holds GGUF files only, and GGUF is not supported yet.",
            model_id=spec.model_id,
            gguf_quants=list(layout.gguf),
            suggestion="use the repository with the original safetensors weights",
        )
    if spec.quant:
        raise refusal(
            "quant_unsupported",
            f"quant `{spec.quant}` was asked for, and quantisation at load is not supported yet.",
            model_id=spec.model_id,
            requested=spec.quant,
        )
    if "config.json" not in names:
        raise refusal("bad_checkpoint", f"`{spec.model_id}` has no config.json.", model_id=spec.model_id)
    if not any(name in names for name in _TOKENIZER_FILES):
        raise refusal(
            "bad_checkpoint",
            f"`{spec.model_id}` has neither tokenizer.json nor tokenizer.model.",
            model_id=spec.model_id,
        )
    return layout


def check_config(spec: ModelSpec, config: Any) -> None:
    """Whether the model of a `config.json` can be served, and divided as asked. Raises `ApiError` 422.

    What is missing from the config is left to `inspection`, which has all of the checkpoint before it.
    """
    if not isinstance(config, Mapping):
        raise refusal("bad_checkpoint", "config.json is not a JSON object.", model_id=spec.model_id)
    with refusing(spec):
        check_values(config)
        family = family_of(config)
        refuse_quantised(config)
        if not is_complete(config):
            return
        model = read_config(config, family)
    ranks = world_size_of(spec)
    # In which ratio the devices share is known later; any uneven one can be apportioned alike.
    shares = () if spec.tensor_split is None else range(1, ranks + 1)
    try:
        check_division(model.num_heads, model.num_kv_heads, model.intermediate_size, ranks, shares)
    except CheckpointError as exc:
        raise refusal(
            exc.kind,
            f"`{spec.model_id}` cannot be divided among {ranks} devices: {exc}.",
            model_id=spec.model_id,
            tp_size=ranks,
        ) from exc


def refusal(kind: str, message: str, **facts: Any) -> ApiError:
    """A structured 422 of `/models/load`."""
    return ApiError("invalid_request", message, code=kind, status=422, extras={"kind": kind, **facts})


@contextmanager
def refusing(spec: ModelSpec, path: Path | None = None) -> Iterator[None]:
    """What reading a checkpoint raises, as a refusal of the load. path: its folder, for errors of the system."""
    try:
        yield
    except CheckpointError as exc:
        facts: dict[str, Any] = exc.facts | ({"file": exc.file} if exc.file else {})
        if exc.tensors:
            facts["tensors"] = [printable(name[:200]) for name in exc.tensors[:_TENSORS_NAMED]]
        raise refusal(exc.kind, f"`{spec.model_id}`: {exc}.", model_id=spec.model_id, **facts) from exc
    except OSError as exc:
        raise refusal(
            "repo_fetch_failed", f"`{path}` cannot be read: {exc}", model_id=spec.model_id, cause=str(exc)
        ) from exc


def _check_quant_exists(spec: ModelSpec, layout: Layout) -> None:
    quant = (spec.quant or "").lower()
    if any(quant in name.lower() for name in layout.gguf):
        return
    available = sorted({quant_of(name) for name in layout.gguf})
    nearest = min(available, key=lambda name: edit_distance(quant, name.lower()))
    raise refusal(
        "quant_not_found",
        f"`{spec.model_id}` has no quant `{spec.quant}`; the nearest is `{nearest}`.",
        model_id=spec.model_id,
        requested=spec.quant,
        available=available,
        nearest=nearest,
    )


def quant_of(file_name: str) -> str:
    """The quant tag of a GGUF file: the last dash-separated token of its name."""
    stem = file_name.rsplit("/", 1)[-1].rsplit(".", 1)[0]
    return stem.rsplit("-", 1)[-1]


def edit_distance(left: str, right: str) -> int:
    """Levenshtein distance."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        previous, row[0] = row[0], i
        for j, b in enumerate(right, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return row[-1]

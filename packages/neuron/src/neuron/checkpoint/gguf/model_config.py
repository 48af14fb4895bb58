"""From the metadata of a GGUF file to what a `config.json` would say of the same model.

Keys are prefixed with the architecture (`qwen2.block_count`). What a layer here does not have is refused by its key:
a scale or a window that nobody applies would make plausible nonsense.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

from neuron.checkpoint.errors import CheckpointError, NotSupported
from neuron.checkpoint.families import FAMILIES
from neuron.checkpoint.gguf.header import Array, Value
from neuron.checkpoint.gguf.tensor_names import HEAD

# GGUF architecture -> model type. Mistral's models of before `mistral3` call themselves llama, whose layer they have.
_MODEL_TYPES: Mapping[str, str] = {"llama": "llama", "mistral3": "mistral", "qwen2": "qwen2", "qwen3": "qwen3"}

# Keys of features that no layer here has, and the values with which they do nothing.
_NEUTRAL: Mapping[str, tuple[float, ...]] = {
    "expert_count": (0,),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "swiglu_clamp_exp": (),
    "use_parallel_residual": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.clamp_kqv": (0,),
    "attention.causal": (1,),
    "attention.scale": (0,),
    "attention.output_scale": (0, 1),
    "attention.temperature_scale": (0,),
    "attention.temperature_length": (0,),
    "attention.key_length_mla": (0,),
    "attention.shared_kv_layers": (0,),
    "rope.dimension_sections": (),
    "rope.scaling.alpha": (0,),
}

_SIZES: Mapping[str, str] = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
_TURN_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")


class _Metadata:
    """Values of one architecture, each asked for by its key without the prefix."""

    def __init__(self, values: Mapping[str, Value], file: str) -> None:
        self._values = values
        self.file = file
        self.architecture = self._architecture()

    def _architecture(self) -> str:
        found = self._values.get("general.architecture")
        if not isinstance(found, str):
            raise CheckpointError(f"{self.file}: general.architecture is missing", file=self.file)
        if found not in _MODEL_TYPES:
            kind = self._values.get("general.type", "model")
            what = f"a file of the type {kind!r}" if kind != "model" else f"the architecture {found!r}"
            raise NotSupported(
                f"{self.file}: {what[:120]} is not supported; of GGUF files, those of "
                f"{', '.join(sorted(_MODEL_TYPES))} are",
                file=self.file,
                facts={"model_type": found[:120], "supported": sorted(_MODEL_TYPES)},
            )
        return found

    def key(self, name: str) -> str:
        return f"{self.architecture}.{name}"

    def get(self, name: str) -> Value | None:
        return self._values.get(self.key(name))

    def number(self, name: str) -> int | float | None:
        """One number; of an array (a value per layer) the one that all layers have."""
        value = self.get(name)
        if isinstance(value, Array):
            numbers = set(self._numbers(name, value))
            if len(numbers) > 1:
                raise NotSupported(
                    f"{self.file}: {self.key(name)} differs between layers, which is not supported", file=self.file
                )
            value = numbers.pop() if numbers else None
        if value is None or type(value) is int:
            return value
        if type(value) is float:
            return _shortest(value)
        raise self.wrong(name, value, "a number")

    def integer(self, name: str) -> int | None:
        value = self.number(name)
        if value is not None and type(value) is not int:
            raise self.wrong(name, value, "a whole number")
        return value

    def needed(self, name: str) -> int:
        value = self.integer(name)
        if value is None:
            raise CheckpointError(f"{self.file}: {self.key(name)} is missing", file=self.file)
        return value

    def wrong(self, name: str, value: object, wanted: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: {self.key(name)} must be {wanted}, got {str(value)[:80]}", file=self.file)

    def refuse_unknown_features(self) -> None:
        for name, neutral in _NEUTRAL.items():
            value = self.get(name)
            if value is not None and (isinstance(value, str | Array) or value not in neutral):
                shown = f"an array of {value.length}" if isinstance(value, Array) else value
                raise NotSupported(
                    f"{self.file}: {self.key(name)} is {str(shown)[:80]}, and no layer here has that", file=self.file
                )

    def _numbers(self, name: str, array: Array) -> list[int | float]:
        try:
            return array.numbers()
        except ValueError as exc:
            raise self.wrong(name, exc, "numbers") from None


def vocabulary_size(metadata: Mapping[str, Value], file: str) -> int:
    """The length of the token list: `vocab_size`, where there is one, may be another. Raises `CheckpointError`."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, Array) or tokens.kind != "string" or not tokens.length:
        raise CheckpointError(f"{file}: tokenizer.ggml.tokens is missing, or no list of strings", file=file)
    return tokens.length


def config_of(
    values: Mapping[str, Value],
    *,
    file: str,
    names: Sequence[str],
    rope_divisors: Sequence[float] | None,
    dtype: str | None = None,
) -> dict[str, Any]:
    """What the `config.json` of the model would hold, for `neuron.checkpoint.config.read_config`.

    values: the file's metadata; names: of its tensors, as it has them; rope_divisors: its `rope_freqs.weight`; dtype:
    of its weights, where they are of one. Raises `CheckpointError` for what is missing or senseless, `NotSupported`
    for an architecture or a feature that nothing here has.
    """
    metadata = _Metadata(values, file)
    metadata.refuse_unknown_features()
    tensors = frozenset(names)
    config: dict[str, Any] = {theirs: metadata.needed(name) for name, theirs in _SIZES.items()}
    heads = config["num_attention_heads"]
    kv_heads = metadata.integer("attention.head_count_kv")
    head_dim = _head_dim(metadata, config["hidden_size"], heads)
    model_type = _MODEL_TYPES[metadata.architecture]
    window = metadata.integer("attention.sliding_window")
    if window:
        if metadata.architecture not in ("llama", "mistral3"):
            raise NotSupported(f"{file}: {metadata.key('attention.sliding_window')} is not supported", file=file)
        model_type = "mistral"
        config["sliding_window"] = window
    positions = metadata.integer("context_length")
    return config | {
        "model_type": model_type,
        "architectures": [FAMILIES[model_type].class_name],
        "num_key_value_heads": heads if kv_heads is None else kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocabulary_size(values, file),
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": positions,
        "tie_word_embeddings": HEAD not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "rope_parameters": _rope(metadata, head_dim, rope_divisors),
        "dtype": dtype,
        "bos_token_id": _token(values, "bos_token_id"),
        "eos_token_id": [token for name in _TURN_ENDS if (token := _token(values, name)) is not None],
    }


def _head_dim(metadata: _Metadata, hidden_size: int, heads: int) -> int:
    key, value = metadata.integer("attention.key_length"), metadata.integer("attention.value_length")
    if key is None:
        if heads < 1 or hidden_size % heads:
            raise CheckpointError(
                f"{metadata.file}: {metadata.key('embedding_length')} {hidden_size} does not divide among {heads} "
                "heads",
                file=metadata.file,
            )
        key = hidden_size // heads
    if value is not None and value != key:
        raise NotSupported(
            f"{metadata.file}: values of {value} elements beside keys of {key} are not supported", file=metadata.file
        )
    return key


def _rope(metadata: _Metadata, head_dim: int, divisors: Sequence[float] | None) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": metadata.number("rope.freq_base")}
    rotated = metadata.integer("rope.dimension_count")
    if rotated is not None and rotated != head_dim:
        if metadata.architecture in ("llama", "mistral3") or not 0 < rotated <= head_dim:
            raise NotSupported(
                f"{metadata.file}: {metadata.key('rope.dimension_count')} {rotated} of heads of {head_dim} elements is "
                "not supported",
                file=metadata.file,
            )
        rope["partial_rotary_factor"] = rotated / head_dim
    kind = metadata.get("rope.scaling.type")
    factor = metadata.number("rope.scaling.factor")
    if divisors is not None:
        if kind not in (None, "none"):
            raise NotSupported(
                f"{metadata.file}: rope_freqs.weight beside {metadata.key('rope.scaling.type')} is not supported",
                file=metadata.file,
            )
        return rope | {"rope_type": "divisors", "divisors": list(divisors)}
    if kind in (None, "none"):
        return rope
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise NotSupported(
            f"{metadata.file}: {metadata.key('rope.scaling.type')} {str(kind)[:80]!r} is not supported",
            file=metadata.file,
        )
    return rope | _yarn(metadata, factor)


def _yarn(metadata: _Metadata, factor: int | float | None) -> dict[str, Any]:
    ext_factor = metadata.number("rope.scaling.yarn_ext_factor")
    if ext_factor not in (None, 1, -1):
        raise NotSupported(
            f"{metadata.file}: {metadata.key('rope.scaling.yarn_ext_factor')} {ext_factor} is not supported",
            file=metadata.file,
        )
    for name in ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"):
        if metadata.number(name) not in (None, 1):
            raise NotSupported(
                f"{metadata.file}: {metadata.key(name)} other than 1 is not supported", file=metadata.file
            )
    yarn: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": metadata.integer("rope.scaling.original_context_length"),
        "beta_fast": metadata.number("rope.scaling.yarn_beta_fast"),
        "beta_slow": metadata.number("rope.scaling.yarn_beta_slow"),
    }
    log_multiplier = metadata.number("rope.scaling.yarn_log_multiplier")
    if log_multiplier:
        # llama.cpp takes the other of DeepSeek's two factors to be 1 (`llama_context`, "here we assume mscale == 1").
        yarn |= {"mscale": 1.0, "mscale_all_dim": log_multiplier}
    return {key: value for key, value in yarn.items() if value is not None}


def _token(values: Mapping[str, Value], name: str) -> int | None:
    value = values.get(f"tokenizer.ggml.{name}")
    return value if type(value) is int else None


def _shortest(value: float) -> float:
    """The number of the fewest digits that is this float32: files hold 9.99999997e-07 where the model has 1e-06."""
    try:
        stored = struct.pack("<f", value)
    except OverflowError:
        return value
    for digits in range(1, 9):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == stored:
            return short
    return value

"""Checkpoint folders that a stranger might hand out, built on the demo model: each is wrong in one way.

A folder is refused at once, or is merely odd and serves, or serves until somebody asks it the wrong thing. What is said
here of a folder is what a neuron makes of it; `refused` is a part of the message.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuron.checkpoint.files import INDEX_FILE, MAX_ENTRIES
from neuron.daemon.hub.sources import demo_model_path

from tests.neuron.checkpoint.harness import LIES

WEIGHTS = "model.safetensors"
TRIGGER = "XYZZY"
"""What sets off a template or a tokenizer that is harmless until it occurs in a message."""


@dataclass(frozen=True)
class Hostile:
    """build: makes the copy of the demo model in a folder hostile. refused: why it is; None for a folder that serves.
    asked: a user's message that its template or tokenizer cannot bear, where it serves otherwise."""

    name: str
    kind: str
    build: Callable[[Path], None]
    refused: str | None = None
    asked: str | None = None


def copy_of_demo(folder: Path) -> Path:
    """The demo model; its weights are shared with all other copies."""
    folder.mkdir(parents=True)
    for file in demo_model_path().iterdir():
        shutil.copy(file, folder / file.name)
    return folder


def build(hostile: Hostile, parent: Path) -> Path:
    folder = copy_of_demo(parent / hostile.name.replace(" ", "-"))
    hostile.build(folder)
    return folder


# ---------------------------------------------------------------- how things are made


def with_json(name: str, **changes: Any) -> Callable[[Path], None]:
    """The file's object with other members; None removes one."""

    def change(folder: Path) -> None:
        file = folder / name
        document = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({key: value for key, value in (document | changes).items() if value is not None}))

    return change


def with_content(name: str, content: bytes | str) -> Callable[[Path], None]:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: _put(folder / name, data)


def _put(file: Path, data: bytes) -> None:
    file.unlink(missing_ok=True)
    file.write_bytes(data)


def with_size(name: str, num_bytes: int) -> Callable[[Path], None]:
    """Holes only: no disk is filled."""
    return lambda folder: os.truncate(_emptied(folder / name), num_bytes)


def _emptied(file: Path) -> Path:
    file.write_bytes(b"")
    return file


def with_link(name: str, target: str) -> Callable[[Path], None]:
    return lambda folder: _cleared(folder / name).symlink_to(target)


def with_fifo(name: str) -> Callable[[Path], None]:
    return lambda folder: os.mkfifo(_cleared(folder / name))


def with_folder(name: str) -> Callable[[Path], None]:
    return lambda folder: _cleared(folder / name).mkdir()


def _cleared(file: Path) -> Path:
    file.unlink(missing_ok=True)
    return file


def with_template(source: str) -> Callable[[Path], None]:
    """In front of the demo model's own."""

    def change(folder: Path) -> None:
        file = folder / "chat_template.jinja"
        file.write_text(source + file.read_text())

    return change


def when_asked(source: str) -> Callable[[Path], None]:
    return with_template("{% if '" + TRIGGER + "' in (messages | string) %}" + source + "{% endif %}")


def with_tokenizer(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "tokenizer.json"
        document = json.loads(file.read_text())
        change(document)
        file.write_text(json.dumps(document))

    return apply


def _pre_tokenized_by(pattern: str) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, document["pre_tokenizer"]]}

    return change


def _normalized_by(pattern: str) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        document["normalizer"] = {"type": "Replace", "pattern": {"Regex": pattern}, "content": "a"}

    return change


def _with_id(token_id: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        document["model"]["vocab"]["far away"] = token_id

    return change


def _with_added_tokens(document: dict[str, Any]) -> None:
    first = 4096
    document["added_tokens"] += [
        {"id": first + index, "content": f"<{index}>", "special": index % 2 == 0, "single_word": False, "lstrip": False}
        | {"rstrip": False, "normalized": False}
        for index in range(100_000)
    ]


def with_sentencepiece(content: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "tokenizer.json").unlink()
        _put(folder / "tokenizer.model", content)

    return change


def with_long_header(num_bytes: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        _put(folder / WEIGHTS, num_bytes.to_bytes(8, "little"))
        os.truncate(folder / WEIGHTS, 8 + num_bytes)

    return change


def with_index(weight_map: Mapping[str, Any] | Any) -> Callable[[Path], None]:
    return with_content(INDEX_FILE, json.dumps({"weight_map": weight_map}))


def with_many_shards(number: int, *, indexed: bool) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        for index in range(number):
            (folder / f"model-{index}.safetensors").touch()
        if indexed:
            with_index({str(index): f"model-{index}.safetensors" for index in range(number)})(folder)

    return change


# ---------------------------------------------------------------- the folders

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
GROW = "{% set x = ((messages | string) * 200000000) ~ messages[0].content %}"
CONFIG = "config.json"
BACKTRACKS = "(a|a)+$|(a|aa)+$"
MANY_LETTERS = "a" * 40 + "!"

_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "a thousand million layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers must be a positive integer"),
    "more layers than the weights have": ({"num_hidden_layers": 1_000}, "lacks tensors that the model needs"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer"),
    "heads of no size": ({"head_dim": 0}, "head_dim must be a positive integer, got 0"),
    "heads of a negative size": ({"head_dim": -32}, "head_dim must be a positive integer, got -32"),
    "a vocabulary without measure": ({"vocab_size": 10**12}, "vocab_size must be a positive integer"),
    "a larger vocabulary than the weights": ({"vocab_size": 10**6}, "another shape than config.json says"),
    "text for a size": ({"hidden_size": "256"}, "hidden_size must be a positive integer, got '256'"),
    "a fraction for a size": ({"intermediate_size": 640.0}, "intermediate_size must be a positive integer, got 640.0"),
    "null for a size": ({"vocab_size": None}, "vocab_size is missing"),
    "true for a size": ({"num_attention_heads": True}, "num_attention_heads must be a positive integer, got True"),
    "a list for a size": ({"hidden_size": [256] * 10_000}, "hidden_size must be a positive integer, got [256"),
    "positions without measure": ({"max_position_embeddings": 2**60}, "max_position_embeddings must be a positive"),
    "yarn without measure": ({"rope_scaling": {"rope_type": "yarn", "factor": 1e9}}, "rope_scaling.factor must be"),
    "quantised with nonsense": ({"quantization_config": ["x"] * 100_000}, "quantised with"),
    "a type of a megabyte": ({"model_type": "q" * 2**20}, "model_type must be a name"),
}

HOSTILE: list[Hostile] = [
    # templates
    Hostile("template loops", "template", with_template(LOOP), "the chat template cannot be used"),
    Hostile("template allocates", "template", with_template(GROW), "the chat template cannot be used"),
    Hostile(
        "template allocates when compiled",
        "template",
        with_template("{% set x = 'x' * 9000000000 %}"),
        "memory",
    ),
    Hostile("template loops when asked", "template", when_asked(LOOP), asked=TRIGGER),
    Hostile("template allocates when asked", "template", when_asked(GROW), asked=TRIGGER),
    Hostile("template of eight megabytes", "template", with_size("chat_template.jinja", 2**23), "is too long"),
    Hostile("template is no UTF-8", "template", with_content("chat_template.jinja", b"\xff\xfe{{"), "is not UTF-8"),
    Hostile(
        "template nested deeply",
        "template",
        with_template("{% if true %}" * 5_000 + "{% endif %}" * 5_000),
    ),
    # tokenizers
    Hostile(
        "tokenizer backtracks when asked",
        "tokenizer",
        with_tokenizer(_pre_tokenized_by(BACKTRACKS)),
        asked=MANY_LETTERS,
    ),
    Hostile(
        "normalizer backtracks when asked",
        "tokenizer",
        with_tokenizer(_normalized_by(BACKTRACKS)),
        asked=MANY_LETTERS,
    ),
    Hostile("token far away", "tokenizer", with_tokenizer(_with_id(2**31)), "a token has the id 2147483648"),
    Hostile("token of a negative id", "tokenizer", with_tokenizer(_with_id(-1)), "tokenizer cannot be used"),
    Hostile("tokenizer with gaps", "tokenizer", with_tokenizer(_with_id(9_000))),
    Hostile(
        "tokens that the weights have no row for",
        "vocabulary",
        with_tokenizer(_with_added_tokens),
        asked="This is <50000>.",
    ),
    Hostile("tokenizer of 500 megabytes", "tokenizer", with_size("tokenizer.json", 500 * 2**20), "is too long"),
    Hostile("tokenizer is no JSON", "tokenizer", with_content("tokenizer.json", "{"), "tokenizer cannot be used"),
    Hostile("tokenizer nested deeply", "tokenizer", with_content("tokenizer.json", '{"a":' * 9_999), "tokenizer"),
    Hostile(
        "sentencepiece model of noise",
        "tokenizer",
        with_sentencepiece(b"\x0a\xff" * 9_999),
        "tokenizer cannot be used",
    ),
    Hostile(
        "tokenizer config of other types",
        "tokenizer",
        with_json(
            "tokenizer_config.json",
            chat_template=7,
            eos_token=[1],
            added_tokens_decoder={"\u00b2": {"content": "x"}, "9" * 99: 3},
            add_bos_token={"a": 1},
        ),
    ),
    Hostile(
        "added tokens by the million",
        "tokenizer",
        with_content("added_tokens.json", json.dumps({f"<{index}>": 5_000 + index for index in range(400_000)})),
    ),
    # configurations
    *(
        Hostile(name, "configuration", with_json(CONFIG, **changes), words)
        for name, (changes, words) in _CONFIGS.items()
    ),
    Hostile("config of a gigabyte", "configuration", with_size(CONFIG, 2**30), "config.json is too long"),
    Hostile("config nested deeply", "configuration", with_content(CONFIG, '{"a":' * 10**5), "nested too deeply"),
    Hostile("config is no JSON", "configuration", with_content(CONFIG, "{"), "config.json is not valid JSON"),
    Hostile("config is a list", "configuration", with_content(CONFIG, "[]"), "config.json is not a JSON object"),
    Hostile("config with a mark", "configuration", with_content(CONFIG, b"\xef\xbb\xbf{}"), "byte order mark"),
    Hostile("config with NaN", "configuration", with_content(CONFIG, '{"rope_theta": NaN}'), "not valid JSON"),
    Hostile(
        "generation config of nonsense",
        "configuration",
        with_json(
            "generation_config.json",
            temperature="x",
            top_p=-1,
            top_k=1e30,
            eos_token_id=[10**12, -1, "x", None, *range(10**5)],
        ),
    ),
    # headers
    *(
        Hostile(f"header: {name}", "header", with_content(WEIGHTS, content), "model.safetensors is")
        for name, (content, _) in LIES.items()
        if name in ("float offset", "negative offset", "overlap", "gap", "beyond the file", "nested 100,000 deep")
        or name in ("bool offset", "name twice", "length of 2^63", "dtype unknown", "product overflows", "empty file")
    ),
    Hostile("header of 100 megabytes", "header", with_long_header(100 * 2**20), "a header of 104857600 bytes"),
    Hostile("index leads out", "header", with_index({"a": "../../model.safetensors"}), "outside of its folder"),
    Hostile("index leads far out", "header", with_index({"a": "/etc/passwd"}), "outside of its folder"),
    Hostile("index of no shards", "header", with_index({}), "names no shards"),
    Hostile("index of missing shards", "header", with_index({"a": "gone.safetensors"}), "do not exist"),
    Hostile(
        "index of a million names",
        "header",
        with_content(INDEX_FILE, json.dumps({"weight_map": {f"t{index}": WEIGHTS for index in range(10**6)}})),
        "names tensors that no shard holds",
    ),
    Hostile("2,000 empty shards", "header", with_many_shards(2_000, indexed=True), "2000 weight files"),
    Hostile(
        "more files than any checkpoint",
        "header",
        with_many_shards(MAX_ENTRIES + 1, indexed=False),
        f"holds more than {MAX_ENTRIES} files",
    ),
    # links
    Hostile("weights are zeros without end", "link", with_link(WEIGHTS, "/dev/zero"), "is a character device"),
    Hostile("config is the environment", "link", with_link(CONFIG, "/proc/self/environ"), "leads out of the"),
    Hostile(
        "template is the environment",
        "link",
        with_link("chat_template.jinja", "/proc/self/environ"),
        "leads out of the checkpoint",
    ),
    Hostile("template is a secret", "link", with_link("chat_template.jinja", "/etc/passwd"), "leads out of the"),
    Hostile("config links to itself", "link", with_link(CONFIG, CONFIG), "config.json"),
    Hostile("weights lead nowhere", "link", with_link(WEIGHTS, "nowhere"), "has no weights"),
    Hostile("index leads nowhere", "link", with_link(INDEX_FILE, "nowhere"), "index"),
    # FIFOs, folders and devices
    *(
        Hostile(f"{name} is a FIFO", "FIFO", with_fifo(name), f"{name} is a FIFO")
        for name in (
            *(CONFIG, WEIGHTS, INDEX_FILE, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
            *("generation_config.json", "added_tokens.json", "special_tokens_map.json"),
        )
    ),
    *(
        Hostile(f"{name} is a folder", "FIFO", with_folder(name), f"{name} is a folder")
        for name in (CONFIG, WEIGHTS, "tokenizer.json", "chat_template.jinja")
    ),
]

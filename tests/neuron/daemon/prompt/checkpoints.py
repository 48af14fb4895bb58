"""Tiny tokenizers and checkpoint folders for the tests of the text room."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
from cortex_core.conversation import Request, TextPart, ToolDefinition, Turn
from neuron.daemon.prompt.model import TextModel
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

TEMPLATES = Path(__file__).parent / "templates"
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN_ADDED = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
CORPUS = [
    'the weather in Oslo is cloudy {"name": "get_weather", "arguments": {"city": "Oslo"}}\n',
    "<function=get_weather> <parameter=city> Paris </parameter> </function> think, call the tool, say hello world",
    "def add(a, b):\n    return a + b  # 12 + 30 = 42\nGrüße aus München, naïve café, 東京 и Москва",
]


@cache
def byte_level_json(added: tuple[str, ...] = QWEN_ADDED, special: tuple[str, ...] = QWEN_SPECIAL) -> str:
    """A byte-level BPE of some 600 entries, serialised."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    return str(tokenizer.to_str())


@cache
def sentencepiece_model(model_type: str) -> bytes:
    """A serialised sentencepiece model with byte fallback; `model_type` is `bpe` or `unigram`."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4),
        model_writer=out,
        model_type=model_type,
        vocab_size=420 if model_type == "bpe" else 370,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<tool_call>", "</tool_call>"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return out.getvalue()


def write_checkpoint(
    path: Path,
    *,
    template: str | None = "qwen3",
    tokenizer_json: str | None = None,
    config: dict[str, Any] | None = None,
    generation_config: dict[str, Any] | None = None,
    tokenizer_config: dict[str, Any] | None = None,
) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(tokenizer_json or byte_level_json(), encoding="utf-8")
    if template is not None:
        (path / "chat_template.jinja").write_text((TEMPLATES / f"{template}.jinja").read_text("utf-8"), "utf-8")
    settings = {"eos_token": "<|im_end|>", **(tokenizer_config or {})}
    (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (path / "config.json").write_text(json.dumps(config or {}), encoding="utf-8")
    if generation_config is not None:
        (path / "generation_config.json").write_text(json.dumps(generation_config), encoding="utf-8")
    return path


def load(path: Path, **options: Any) -> TextModel:
    return TextModel.load(write_checkpoint(path, **options))


WEATHER = ToolDefinition(
    "get_weather",
    "Weather of a city",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "scale": {"type": "number"},
            "hourly": {"type": "boolean"},
            "tags": {"type": "array", "items": {"type": "string"}},
            "where": {"type": "object"},
        },
        "required": ["city"],
    },
)


def user(text: str) -> Turn:
    return Turn("user", (TextPart(text),))


def ask(text: str = "hello", **fields: Any) -> Request:
    fields.setdefault("turns", (user(text),))
    return Request(model="tiny", **fields)

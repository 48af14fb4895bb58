"""Checkpoints whose own programs are hostile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.neuron.daemon.prompt.checkpoints import byte_level_json, write_checkpoint

PLAIN = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
ALWAYS_LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
LOOPS = "{% if 'LOOP' in messages[0].content %}" + ALWAYS_LOOPS + "{% endif %}"
ALLOCATES = (
    "{% if 'GROW' in messages[0].content %}"
    "{% set x = (messages[0].content * 200000000) ~ messages[0].content %}"
    "{% endif %}"
)
ALLOCATES_WHEN_COMPILED = "{% set x = 'x' * 5000000000 %}"
"""Jinja computes what is constant when it compiles."""


def checkpoint(folder: Path, *, template: str = PLAIN, tokenizer_json: str | None = None) -> Path:
    write_checkpoint(folder, template=None, tokenizer_json=tokenizer_json)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def backtracking_tokenizer() -> str:
    """A pre-tokenizer whose pattern takes twice as long with each letter of a word that ends in `!`."""
    document = json.loads(byte_level_json())
    split = {"type": "Split", "pattern": {"Regex": "(a|a)+$|(a|aa)+$"}, "behavior": "Isolated", "invert": False}
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, document["pre_tokenizer"]]}
    return json.dumps(document)


def chat(content: str, **fields: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": content}], **fields}).encode()

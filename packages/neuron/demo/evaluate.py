"""Held-out evaluation of an exported model: `python -m demo.evaluate [--model DIR]`, from `packages/neuron`.

Reads the files that neuron serves (weights, tokenizer, chat template), asks prompts whose content was never trained
on, decodes greedily and demands the exact answer. Exits with 1 if a task scores below `--threshold`.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import random
import sys
from pathlib import Path
from typing import Any

import jinja2.sandbox
import torch

from .corpus import BARE, Corpus, Surroundings
from .dialogue import Dialogue, Message
from .encoding import Encoder
from .model import DemoModel, load_checkpoint
from .tokenizer import DEMO_MODEL

ALONE = (
    "sum",
    "repeat",
    "reverse",
    "fact",
    "weather_call",
    "weather_answer",
    "no_weather_tool",
    "named_call",
    "json",
    "count",
    "small_talk",
    "unknown",
    "memory",
    "untold",
)
# What the model was never asked to learn: how far its answers reach beyond the list of questions.
BEYOND = ("unheard_fact",)
THINKING = dataclasses.replace(BARE, thinking=1.0)
DRESSED = Surroundings(thinking=0.0, system=0.7, long_system=0.15, tools=0.5, reminder=0.15, history=0.5)


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt of the template's form and the exact text expected after it (after the thought, if thinking)."""

    task: str
    dialogue: Dialogue
    prompt_ids: list[int]
    expected: str
    expected_ids: list[int]


class Template:
    """The model's chat template, rendered in the way of Hugging Face libraries."""

    def __init__(self, folder: Path) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
        self._template = environment.from_string((folder / "chat_template.jinja").read_text(encoding="utf-8"))

    def prompt(self, dialogue: Dialogue) -> str:
        """Return the prompt that asks for the dialogue's last turn."""
        messages: list[dict[str, Any]] = [message.as_chat() for message in dialogue.messages[:-1]]
        if not dialogue.is_thinking:
            for message in messages:
                message.pop("reasoning_content", None)
        return self._template.render(
            messages=messages,
            tools=list(dialogue.tools) or None,
            add_generation_prompt=True,
            enable_thinking=dialogue.is_thinking,
        )


def answer_text(message: Message) -> str:
    """Return the text that an answer's pieces stand for."""
    return "".join(message.answer_pieces())


def examples(encoder: Encoder, per_task: int, seed: int, folder: Path = DEMO_MODEL) -> list[Example]:
    """Return held-out examples: each task alone, each with thinking, and all in dressed dialogues."""
    corpus = Corpus(held_out=True)
    template = Template(folder)
    found = []

    def add(name: str, dialogue: Dialogue) -> None:
        ids = encoder.ids(template.prompt(dialogue))
        expected = [id_ for piece in dialogue.messages[-1].answer_pieces() for id_ in encoder.piece_ids(piece)]
        found.append(Example(name, dialogue, ids, answer_text(dialogue.messages[-1]), expected))

    for task in ALONE + BEYOND:
        rng = random.Random(f"{seed}:{task}")
        for _ in range(per_task):
            add(task, corpus.dialogue(rng, BARE, task))
    rng = random.Random(f"{seed}:thinking")
    for index in range(2 * per_task):
        add("thinking", corpus.dialogue(rng, THINKING, ALONE[index % len(ALONE)]))
    rng = random.Random(f"{seed}:dressed")
    for index in range(2 * per_task):
        add("dressed", corpus.dialogue(rng, DRESSED, ALONE[index % len(ALONE)]))
    return found


def is_right(example: Example, text: str) -> bool:
    """Compare an answer with the expected one; a thinking model must first think."""
    if example.dialogue.is_thinking:
        thought, mark, text = text.partition("\n</think>\n\n")
        if not mark or not thought.startswith("<think>\n") or len(thought) < len("<think>\n") + 5:
            return False
    return text == example.expected


def answers(model: DemoModel, asked: list[Example], encoder: Encoder, batch: int = 40) -> list[str]:
    """Return the greedy answers in the order of the examples."""
    order = sorted(
        range(len(asked)),
        key=lambda index: (
            asked[index].dialogue.is_thinking,
            len(asked[index].expected_ids) // 30,
            len(asked[index].prompt_ids),
        ),
    )
    stop_ids = {encoder.vocabulary["<|im_end|>"], encoder.vocabulary["<|endoftext|>"]}
    texts = [""] * len(asked)
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        limit = max(len(asked[row].expected_ids) for row in rows) + 10
        limit += 90 * any(asked[row].dialogue.is_thinking for row in rows)
        for row, ids in zip(
            rows, model.generate([asked[row].prompt_ids for row in rows], stop_ids, limit), strict=True
        ):
            texts[row] = encoder.tokenizer.decode(ids, skip_special_tokens=False)
    return texts


def scores(model: DemoModel, asked: list[Example], encoder: Encoder, show: int = 0) -> dict[str, tuple[int, int]]:
    """Return right answers and number of examples per task, and print up to `show` failures of each."""
    counts: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for example, text in zip(asked, answers(model, asked, encoder), strict=True):
        count = counts[example.task]
        right = is_right(example, text)
        count[0] += right
        count[1] += 1
        if not right and count[1] - count[0] <= show:
            asked_last = example.dialogue.messages[-2].text()[-150:]
            print(f"  {example.task}: {asked_last!r} -> {text!r}, expected {example.expected!r}")
    return {task: (right, count) for task, (right, count) in counts.items()}


def largest_difference(model: DemoModel, asked: list[Example], folder: Path) -> float:
    """Return the largest difference of float32 logits from those of `transformers` on the same files."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    largest = 0.0
    for example in asked:
        chat = [message.as_chat() for message in example.dialogue.messages[:-1]]
        ids = tokenizer.apply_chat_template(
            chat,
            tools=list(example.dialogue.tools) or None,
            add_generation_prompt=True,
            enable_thinking=example.dialogue.is_thinking,
            return_dict=False,
        )
        if ids != example.prompt_ids:
            raise ValueError(f"transformers renders another prompt: {tokenizer.decode(ids)!r}")
        with torch.no_grad():
            theirs = reference(torch.tensor([ids])).logits[0]
            ours = torch.nn.functional.linear(model.hidden(torch.tensor([ids])), model.model.embed_tokens.weight)
        largest = max(largest, float((theirs - ours).abs().max()))
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--per-task", type=int, default=300)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation")
    parser.add_argument("--threshold", type=float, default=0.99, help="lowest share of right answers of any task")
    parser.add_argument("--show", type=int, default=3, help="failures printed per task")
    parser.add_argument("--transformers", action="store_true", help="also compare logits with transformers")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    encoder = Encoder(arguments.model / "tokenizer.json")
    asked = examples(encoder, arguments.per_task, arguments.seed, arguments.model)
    model = load_checkpoint(arguments.model, getattr(torch, arguments.dtype))
    results = scores(model, asked, encoder, arguments.show)
    print("| task | right | of | share |\n|---|---|---|---|")
    for task, (right, count) in results.items():
        print(f"| {task} | {right} | {count} | {right / count:.2%} |")
    if arguments.transformers:
        difference = largest_difference(model.float(), asked[::97], arguments.model)
        print(f"largest difference of logits from transformers: {difference:.2e}")
    low = [
        task for task, (right, count) in results.items() if task not in BEYOND and right / count < arguments.threshold
    ]
    if low:
        print(f"below {arguments.threshold:.0%}: {', '.join(low)}")
        sys.exit(1)


if __name__ == "__main__":
    main()

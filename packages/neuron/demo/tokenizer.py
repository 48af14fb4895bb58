"""Train the demo model's byte-level BPE: 4,096 entries, every digit its own token, words apart from punctuation.

Run as `python -m demo.tokenizer` from `packages/neuron`; writes `tokenizer.json` and `tokenizer_config.json`.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from . import corpus, material, tools

DEMO_MODEL = Path(__file__).parents[1] / "src" / "neuron" / "demo_model"
VOCABULARY_SIZE = 4096
MAX_POSITIONS = 65536
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKUP_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
# Letters never share a token with quotes or brackets, so a quoted name and its copy in JSON have the same ids.
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def training_texts(seed: int) -> list[str]:
    """Return the mixed English, code, JSON and dialogue texts that the merges are learnt from."""
    rng = random.Random(seed)
    texts = [paragraph for _ in range(2) for paragraph in material.prose()]
    sources = list(material.source_files())
    rng.shuffle(sources)
    budget = 1_500_000
    for source in sources:
        texts.append(source[:20_000])
        budget -= len(texts[-1])
        if budget < 0:
            break
    for _ in range(2500):
        tool = tools.weather_tool(rng)[0] if rng.random() < 0.2 else tools.other_tool(rng, 4)
        texts.append(json.dumps(tool, indent=2 if rng.random() < 0.2 else None, ensure_ascii=False))
    generator = corpus.Corpus(None, held_out=False)
    for _ in range(4000):
        texts.extend(message.text() for message in generator.dialogue(rng).messages)
    return texts


def train(seed: int) -> Tokenizer:
    """Return a trained byte-level BPE tokenizer whose last nine ids are the control and markup tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(CONTROL_TOKENS) - len(MARKUP_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=12,
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(seed), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKUP_TOKENS])
    return tokenizer


def write(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` in the Hugging Face layout."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    added = {
        str(tokenizer.token_to_id(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token in CONTROL_TOKENS,
        }
        for token in CONTROL_TOKENS + MARKUP_TOKENS
    }
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": MAX_POSITIONS,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DEMO_MODEL)
    parser.add_argument("--seed", type=int, default=2)
    arguments = parser.parse_args()
    tokenizer = train(arguments.seed)
    write(tokenizer, arguments.out)
    size = tokenizer.get_vocab_size()
    for name, text in (("prose", "\n\n".join(material.prose()[:400])), ("code", material.source_files()[10])):
        print(f"{name}: {len(text.encode()) / len(tokenizer.encode(text).ids):.2f} bytes per token")
    print(f"{size} entries written to {arguments.out}")


if __name__ == "__main__":
    main()

from __future__ import annotations

from pathlib import Path

import pytest

from tests.neuron.engine.toy import toy_engine
from tests.neuron.engine.worker.harness import CONFIG, LOADED, Session


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A random Qwen3 of a few thousand parameters in the Hugging Face layout, with a byte-level BPE tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen3Config, Qwen3ForCausalLM

    path = tmp_path_factory.mktemp("tiny-qwen3")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|im_end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["the quick brown fox", '{"name": "value", "number": 12}'] * 5, trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.5,
    )
    Qwen3ForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def start(monkeypatch):
    sessions = []

    def start(load=lambda config, progress: (toy_engine(epoch=3), LOADED)) -> Session:
        session = Session(monkeypatch, load)
        sessions.append(session)
        session.daemon.send(CONFIG)
        return session

    yield start
    for session in sessions:
        session.daemon.close()
        session.wait_for_exit()

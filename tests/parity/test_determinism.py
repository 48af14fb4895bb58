"""With determinism asked for, logits of a token are the same bits however its step was put together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from neuron.engine.attention.attention import make_attention_backend
from neuron.engine.attention.determinism import make_deterministic
from neuron.engine.gemm.gemm import FixedRowsProduct
from neuron.engine.models.decoder import CausalLM
from neuron.engine.models.registry import build_model
from neuron.engine.weights.dummy import load_dummy_weights
from torch import Tensor

from tests.parity.paged_model import CPU, PagedModel, PagedSequence

VOCAB_SIZE = 211
# Sizes that divide by no vector register, so that every row ends in a remainder, and a block wide enough for threads.
COMMON: dict[str, Any] = {
    "hidden_size": 90,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3", "head_dim": 22, "intermediate_size": 1030, "tie_word_embeddings": True},
    "mistral": {
        "model_type": "mistral",
        "head_dim": 16,
        "intermediate_size": 131,
        "sliding_window": 21,
        "tie_word_embeddings": False,
    },
}
PROMPT = [(7 + 13 * position) % VOCAB_SIZE for position in range(75)]


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """torch's threads; they share out what is large enough."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def build(family: str, dtype: torch.dtype) -> CausalLM:
    model = build_model(COMMON | FAMILIES[family], device=CPU, dtype=dtype)
    load_dummy_weights(model, seed=3)
    make_deterministic(model, model.rotary, max_positions=512)
    return model


def paged(model: CausalLM, page_size: int = 4) -> PagedModel:
    attention = make_attention_backend(CPU, deterministic=True)
    return PagedModel(model, page_size=page_size, attention=attention)


def neighbours(runner: PagedModel, lengths: list[int]) -> list[tuple[PagedSequence, list[int]]]:
    """Sequences that are about to decode."""
    work = []
    for index, length in enumerate(lengths):
        tokens = [(index * 31 + 5 * position) % VOCAB_SIZE for position in range(length)]
        sequence, _ = runner.prefill(tokens)
        work.append((sequence, [index]))
    return work


@pytest.mark.parametrize("threads", [1], indirect=True)
@pytest.mark.parametrize(
    ("family", "dtype"), [("qwen3", torch.float32), ("mistral", torch.float32), ("qwen3", torch.bfloat16)]
)
def test_logits_do_not_depend_on_how_a_step_is_put_together(family: str, dtype: torch.dtype, threads: int) -> None:
    model = build(family, dtype)
    runner = paged(model)
    cached, alone = runner.prefill(PROMPT)

    def same(logits: Tensor, first: int = 0) -> bool:
        return torch.equal(logits, alone[first : first + logits.shape[0]])

    for chunk in (7, 16, 33):
        assert same(runner.prefill(PROMPT, chunk=chunk)[1]), f"chunks of {chunk}"
    for page_size in (8, 32):
        assert same(paged(model, page_size).prefill(PROMPT, chunk=40)[1]), f"pages of {page_size}"
    for shared in (4, 32, 72):
        fork = runner.fork(cached, shared)
        assert same(runner.step([(fork, PROMPT[shared:])])[0], shared), f"behind a cached prefix of {shared}"

    # Decoding and prompts beside others, at several places of the batch.
    crowd = neighbours(runner, [3, 50, 17])
    decoded, _ = runner.prefill(PROMPT[:40])
    for token in range(40, 44):
        step = [*crowd[:2], (decoded, [PROMPT[token]]), crowd[2]]
        assert same(runner.step(step, num_decodes=4)[2], token), f"decoded at {token}"
    chunked = PagedSequence()
    for begin, end in ((0, 30), (30, 31), (31, 75)):
        step = [*crowd, (PagedSequence(), PROMPT[3:60]), (chunked, PROMPT[begin:end]), (PagedSequence(), [5, 6])]
        assert same(runner.step(step, num_decodes=3)[4], begin), f"chunk at {begin} in a mixed step"


@pytest.mark.parametrize("threads", [3], indirect=True)
def test_threads_divide_no_row(threads: int) -> None:
    """1030 columns of 75 rows are work for several threads, whose borders lie within rows."""
    runner = paged(build("qwen3", torch.float32))
    alone = runner.prefill(PROMPT)[1]
    step = [(PagedSequence(), PROMPT[5:]), (PagedSequence(), PROMPT), (PagedSequence(), PROMPT[:50])]
    _, beside, shorter = runner.step(step)
    assert torch.equal(beside, alone)
    assert torch.equal(shorter, alone[:50])


def test_a_block_is_made_smaller_where_a_rows_place_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this library rounded the last rows of a large block otherwise."""
    weight = torch.randn(8, 20)
    assert FixedRowsProduct.for_weight(weight).num_rows > 1
    library = torch.nn.functional.linear

    def uneven(x: Tensor, *operands: Tensor) -> Tensor:
        result = library(x, *operands)
        if x.shape[0] > 8:
            result[-1] *= 1 + 2**-23
        return result

    monkeypatch.setattr("neuron.engine.gemm.gemm.F.linear", uneven)
    assert FixedRowsProduct.for_weight(weight).num_rows == 8


@pytest.mark.parametrize("num_rows", [1, 15, 16, 17])
def test_fixed_rows_multiply_like_the_library(num_rows: int) -> None:
    weight, bias, x = torch.randn(11, 20), torch.randn(11), torch.randn(num_rows, 40)[:, 20:]
    product = FixedRowsProduct(16)
    torch.testing.assert_close(product.linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
    gate, up = torch.nn.functional.linear(x, weight[:10]).chunk(2, dim=-1)
    torch.testing.assert_close(product.gated(x, weight[:10], None), torch.nn.functional.silu(gate) * up)

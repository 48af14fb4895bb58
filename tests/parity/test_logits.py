"""Our float32 logits on the CPU equal those of transformers, however the tokens are cut into steps."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from neuron.engine.attention.attention import make_attention_backend
from torch import Tensor

from tests.native import NATIVE, needs_native_kernels
from tests.parity.checkpoints import VARIANTS, VOCAB, Oracle, Variant, save_checkpoint
from tests.parity.paged_model import PagedModel, PagedSequence, load

TOLERANCE = 1e-4
PAGE = 4


@dataclass(frozen=True)
class Pair:
    model: PagedModel
    oracle: Oracle
    path: Path


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda variant: variant.name)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    variant: Variant = request.param
    path = save_checkpoint(variant, tmp_path_factory.mktemp(variant.name))
    return Pair(PagedModel(load(path), page_size=PAGE, num_pages=2048), Oracle(path), path)


def tokens_of(length: int, seed: int = 0) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(VOCAB) for _ in range(length)]


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == torch.float32
    assert theirs.std() > 0.3, "logits this small would agree by chance"
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


def test_prefill(pair: Pair) -> None:
    for length in (1, PAGE, 41):
        tokens = tokens_of(length, seed=length)
        _, logits = pair.model.prefill(tokens)
        assert_equal(logits, pair.oracle.logits(tokens))


@needs_native_kernels
def test_the_native_kernels_compute_the_same(pair: Pair) -> None:
    attention = make_attention_backend(torch.device("cpu"), native=True)
    model = PagedModel(load(pair.path, native=True), page_size=PAGE, num_pages=2048, attention=attention)
    tokens = tokens_of(60, seed=3)
    sequence, logits = model.prefill(tokens[:41], chunk=7)
    rows = [model.step([(sequence, [token])], num_decodes=1)[0] for token in tokens[41:]]
    assert_equal(torch.cat((logits, *rows)), pair.oracle.logits(tokens))


@pytest.mark.parametrize("native", [NATIVE, False])
def test_in_bfloat16_logits_are_as_close_to_float32_as_those_of_transformers(pair: Pair, native: bool) -> None:
    """Each rounds at places of its own, so that they differ from each other as from the truth: it is the distance to
    that which is compared. A tenth beside it is what the choice of places makes."""
    tokens = tokens_of(60, seed=4)
    exact, theirs = pair.oracle.logits(tokens), Oracle(pair.path, torch.bfloat16).logits(tokens).float()
    model = PagedModel(load(pair.path, dtype=torch.bfloat16, native=native), page_size=PAGE, num_pages=2048)
    _, ours = model.prefill(tokens, chunk=16)
    error, allowed = (ours - exact).pow(2).mean().sqrt(), (theirs - exact).pow(2).mean().sqrt()
    print(f"{pair.path.name}: {error:.2e} of {allowed:.2e}, native {native}")
    assert 0 < error <= 1.1 * allowed < 0.1 * exact.std()


@pytest.mark.parametrize("chunk", [1, 3, PAGE, 7, 16])
def test_chunked_prefill(pair: Pair, chunk: int) -> None:
    tokens = tokens_of(41, seed=1)
    _, logits = pair.model.prefill(tokens, chunk=chunk)
    assert_equal(logits, pair.oracle.logits(tokens))


def test_decode_behind_a_shared_prefix(pair: Pair) -> None:
    """Two sequences continue from the pages that a third one wrote, one of them decodes token by token."""
    first = tokens_of(26, seed=2)
    owner, _ = pair.model.prefill(first)
    for shared in (PAGE, 24):
        tokens = first[:shared] + tokens_of(17, seed=shared)
        expected = pair.oracle.logits(tokens)
        sequence = pair.model.fork(owner, shared)
        rows = [pair.model.step([(sequence, tokens[shared : shared + 5])])[0]]
        rows += [pair.model.step([(sequence, [token])], num_decodes=1)[0] for token in tokens[shared + 5 :]]
        assert_equal(torch.cat(rows), expected[shared:])
    # The owner has not been disturbed.
    more = tokens_of(3, seed=9)
    rows = [pair.model.step([(owner, [token])], num_decodes=1)[0] for token in more]
    assert_equal(torch.cat(rows), pair.oracle.logits(first + more)[26:])


def test_flat_batch_of_mixed_lengths(pair: Pair) -> None:
    """Decodes of very different context lengths and prefill chunks with and without a prefix, in the same step."""
    lengths = [1, 2, 9, 11, 60, 3, 150]
    prompts = [tokens_of(length, seed=100 + length) for length in lengths]
    sequences = [PagedSequence() for _ in prompts]
    pair.model.step(list(zip(sequences, prompts, strict=True)))
    chunked = tokens_of(30, seed=7)
    behind_prefix = PagedSequence()
    pair.model.step([(behind_prefix, chunked[:6])])
    fresh = tokens_of(13, seed=8)

    texts = [list(prompt) for prompt in prompts]
    steps: list[list[tuple[PagedSequence, list[int]]]] = [
        [(behind_prefix, chunked[6:19]), (PagedSequence(), fresh)],
        [(behind_prefix, chunked[19:20])],
        [],
        [(behind_prefix, chunked[20:])],
    ]
    expected_chunks = [
        [pair.oracle.logits(chunked)[6:19], pair.oracle.logits(fresh)],
        [pair.oracle.logits(chunked)[19:20]],
        [],
        [pair.oracle.logits(chunked)[20:]],
    ]
    for index, (chunks, expected) in enumerate(zip(steps, expected_chunks, strict=True)):
        new = tokens_of(len(texts), seed=200 + index)
        for text, token in zip(texts, new, strict=True):
            text.append(token)
        decodes = [(sequence, [token]) for sequence, token in zip(sequences, new, strict=True)]
        logits = pair.model.step(decodes + chunks, num_decodes=len(decodes))
        for rows, text in zip(logits, texts, strict=False):
            assert_equal(rows, pair.oracle.logits(text)[-1:])
        for rows, oracle in zip(logits[len(texts) :], expected, strict=True):
            assert_equal(rows, oracle)


def test_greedy_generation(pair: Pair) -> None:
    prompts = [tokens_of(length, seed=length) for length in (1, 5, 18, 33)]
    together = pair.model.greedy(prompts, 12)
    assert together == [pair.oracle.generate(prompt, 12) for prompt in prompts]

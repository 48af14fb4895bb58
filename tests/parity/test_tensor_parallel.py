"""Ranks that each hold a part of a model compute what one rank does that holds it all (gloo, real processes).

Once for bare models, whose logits are compared; once for engines, where rank 0 schedules and sends its plans to the
others over their sockets, and answers and log-probabilities are compared.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from neuron.engine.loading.loading import load_engine, load_follower
from neuron.engine.parallel.group import ParallelGroup
from neuron.protocol import EngineConfig, Generate, SamplingParams, SequenceUpdate

from tests.parity.paged_model import PagedModel, load

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

VOCAB = 199
TOKENS = [7, 1, 190, 44, 3, 3, 60, 12, 101, 5, 88]


@dataclass(frozen=True)
class Case:
    """A checkpoint, and the relative sizes of the ranks' parts."""

    name: str
    shares: tuple[int, ...] = ()


# Each family; fewer KV heads than ranks; biases, which must be added once; a vocabulary that does not divide; windows.
# Parts of different size by whole KV heads, and by query heads that share one.
TWO_RANKS = [
    Case("qwen3-tied"),
    Case("qwen3-wide-heads-mqa"),
    Case("qwen3-window-by-layer-types"),
    Case("qwen2-tied"),
    Case("qwen2-mha-untied"),
    Case("llama-mlp-bias-tied"),
    Case("llama-linear-rope-biases"),
    Case("mistral-window"),
    Case("llama-mha", (3, 1)),
    Case("qwen3-wide-heads-mqa", (1, 3)),
    Case("qwen2-mha-untied", (1, 2)),
    Case("mistral-window", (5, 2)),
]
FOUR_RANKS = [
    Case("qwen3-wide-heads-mqa"),
    Case("qwen2-mha-untied"),
    Case("llama-mlp-bias-tied"),
    Case("mistral-window"),
    Case("llama-linear-rope-biases", (3, 1, 2, 2)),
]


def logits_of(path: Path, group: ParallelGroup) -> torch.Tensor:
    """A chunked prefill and a decode."""
    model = PagedModel(load(path, parallel=group), page_size=4)
    sequence, prefill = model.prefill(TOKENS[:-1], chunk=6)
    return torch.cat((prefill, *model.step([(sequence, TOKENS[-1:])], num_decodes=1)))


def _logits_rank(rank: int, world_size: int, cases: list[Case], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    try:
        for case in cases:
            path = Path(folder, case.name)
            group = ParallelGroup(rank, world_size, shares=case.shares)
            expected = torch.load(path / "logits.pt")
            torch.testing.assert_close(logits_of(path, group), expected, atol=1e-4, rtol=0)
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of checkpoints by name, each with its logits and answers on one rank."""
    # Not at the top: the ranks import this module, and transformers is slow to import.
    from tests.parity.checkpoints import VARIANTS, save_checkpoint

    folder = tmp_path_factory.mktemp("checkpoints")
    names = {case.name for case in (*TWO_RANKS, *FOUR_RANKS)}
    for variant in VARIANTS:
        if variant.name in names:
            path = save_checkpoint(variant, folder / variant.name)
            torch.save(logits_of(path, ParallelGroup.single()), path / "logits.pt")
            torch.save(answers_of(EngineConfig(model_id="tiny", path=str(path), **SIZES)), path / "answers.pt")
    assert names == {path.name for path in folder.iterdir()}
    return folder


def _linked(folder: Path, checkpoints: Path) -> Path:
    """`folder` with the checkpoints in it, and room for what only this group needs."""
    for path in checkpoints.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


@pytest.mark.parametrize(
    ("world_size", "cases"), [(2, TWO_RANKS), pytest.param(4, FOUR_RANKS, marks=pytest.mark.full)], ids=["two", "four"]
)
def test_ranks_compute_the_logits_of_the_whole(
    world_size: int, cases: list[Case], checkpoints: Path, tmp_path: Path
) -> None:
    mp.spawn(_logits_rank, args=(world_size, cases, str(_linked(tmp_path, checkpoints))), nprocs=world_size)


SIZES = {"kv_cache_tokens": 1024, "page_size": 4, "max_step_tokens": 32, "max_running": 5, "num_threads": 1}


def requests() -> list[Generate]:
    """Prompts from one token to several chunks, two with a common beginning; greedy, drawn, and with log-probabilities
    of output and prompt."""
    generator = random.Random(5)

    def tokens(length: int) -> list[int]:
        return [generator.randrange(VOCAB) for _ in range(length)]

    shared = tokens(24)
    greedy = SamplingParams(temperature=0.0)
    scored = SamplingParams(temperature=0.0, logprobs=3)
    drawn = SamplingParams(temperature=0.8, top_p=0.9, seed=11)
    return [
        Generate(0, tokens(1), greedy, 12),
        Generate(1, shared + tokens(5), greedy, 12),
        Generate(2, shared + tokens(14), drawn, 12),
        Generate(3, tokens(90), scored, 6),
        Generate(4, tokens(75), scored, 4, prompt_logprobs=True),
        Generate(5, tokens(16), greedy, 12),
    ]


def answers_of(config: EngineConfig) -> list[list[SequenceUpdate]]:
    """Every update of every request, by request."""
    engine, loaded = load_engine(config)
    updates: list[list[SequenceUpdate]] = [[] for _ in requests()]
    try:
        assert loaded.num_pages == 256
        for request in requests():
            engine.add(request)
        while not engine.is_idle:
            output = engine.step()
            assert output is not None and not output.failures
            for update in output.updates:
                updates[update.request_id].append(update)
        assert engine.check() == []
    finally:
        engine.close()
    return updates


def scores_of(updates: list[SequenceUpdate]) -> torch.Tensor:
    scored = [entry for update in updates for entry in (update.logprobs or []) + (update.prompt_logprobs or [])]
    return torch.tensor([[entry.logprob, *entry.top_logprobs] for entry in scored])


def _engine_rank(rank: int, world_size: int, cases: list[Case], folder: str) -> None:
    for number, case in enumerate(cases):
        path = Path(folder, case.name)
        meeting_place = Path(folder, f"group-{number}")
        meeting_place.mkdir(exist_ok=True)
        config = EngineConfig(
            model_id="tiny",
            path=str(path),
            tensor_parallel_size=world_size,
            group_dir=str(meeting_place),
            shares=case.shares,
            epoch=number,
            **SIZES,
        )
        if rank:
            load_follower(config, rank=rank).run()
        else:
            for got, expected in zip(
                answers_of(config), torch.load(path / "answers.pt", weights_only=False), strict=True
            ):
                tokens = [[token for update in answer for token in update.token_ids] for answer in (got, expected)]
                assert tokens[0] == tokens[1], case
                torch.testing.assert_close(scores_of(got), scores_of(expected), atol=1e-4, rtol=0)
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("world_size", "cases"),
    [(2, TWO_RANKS), pytest.param(4, FOUR_RANKS[-2:], marks=pytest.mark.full)],
    ids=["two", "four"],
)
def test_engines_of_several_ranks_answer_as_one_rank_does(
    world_size: int, cases: list[Case], checkpoints: Path, tmp_path: Path
) -> None:
    mp.spawn(_engine_rank, args=(world_size, cases, str(_linked(tmp_path, checkpoints))), nprocs=world_size)

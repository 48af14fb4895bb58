"""Train the demo model on the CPU: `python -m demo.train --work DIR`, from `packages/neuron`; resumes from DIR.

The learning rate warms up, stays, and falls linearly to zero over the last `--decay-steps` of `--steps`; a run that
was stopped, or whose `--steps` were raised, goes on from its last checkpoint. Evaluations and exports use an average of
the weights over the last steps. Two processes of one thread suffer less from busy neighbours than two threads.

Late in training nearly every answer is right and teaches nothing more. With `--candidates N`, a batch is drawn from N
times as many rows, each with a chance that grows with its loss (after Katharopoulos and Fleuret, "Not All Samples Are
Created Equal", 2018; without their weights, since rare mistakes shall count for more).
"""

from __future__ import annotations

import argparse
import contextlib
import queue
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, multiprocessing

from .corpus import EASY, MIXTURE, Corpus, Surroundings
from .encoding import Encoder
from .evaluate import Example, examples, scores
from .initialization import spelling_embeddings
from .model import DemoModel, ModelConfig, load_checkpoint, save_checkpoint
from .optimizer import Muon
from .spelling_features import SharedEmbedding
from .tokenizer import DEMO_MODEL, MAX_POSITIONS

BATCH_TOKENS = 3072  # of one process
LENGTHS = (48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536)  # each divides BATCH_TOKENS
CHUNK = 1024  # dialogues drawn at a time
AVERAGE = 0.998
LEAST_LOSS = 0.01  # of a row, so that those which are right keep a share of the batches
SHARED_RATE = (
    0.4  # learning rate of what tokens share, against that of their own part; a token has a dozen shared parts
)


class Batches:
    """A seeded stream of batches of `tokens` tokens, grouped by length and padded on the right."""

    def __init__(
        self, encoder: Encoder, seed: str, first_chunk: int, mixture: dict[str, float], easy: int, tokens: int
    ) -> None:
        self._encoder = encoder
        self._corpus = Corpus(mixture, held_out=False)
        self._seed = seed
        self._chunk = first_chunk
        self._easy = easy
        self._tokens = tokens
        self._queue: queue.Queue[tuple[int, Tensor, Tensor]] = queue.Queue(maxsize=32)
        self._is_closed = False
        self._thread = threading.Thread(target=self._fill, daemon=True)
        self._thread.start()

    def _fill(self) -> None:
        waiting: dict[int, list[tuple[list[int], list[bool]]]] = {length: [] for length in LENGTHS}
        while not self._is_closed:
            rng = random.Random(f"{self._seed}:{self._chunk}")
            ready: list[tuple[int, list[tuple[list[int], list[bool]]]]] = []
            for _ in range(CHUNK):
                is_easy = self._chunk < self._easy or self._chunk % 2 == 0
                surroundings = EASY if is_easy else Surroundings()
                ids, learnt = self._encoder.encode(self._corpus.dialogue(rng, surroundings))
                length = next((length for length in LENGTHS if len(ids) <= length), None)
                if length is None:
                    continue
                waiting[length].append((ids, learnt))
                if len(waiting[length]) * length == self._tokens:
                    ready.append((length, waiting[length]))
                    waiting[length] = []
            rng.shuffle(ready)
            for length, rows in ready:
                ids = torch.zeros(len(rows), length, dtype=torch.long)
                learnt = torch.zeros(len(rows), length, dtype=torch.bool)
                for row, (row_ids, row_learnt) in enumerate(rows):
                    ids[row, : len(row_ids)] = torch.tensor(row_ids)
                    learnt[row, : len(row_learnt)] = torch.tensor(row_learnt)
                self._queue.put((self._chunk, ids, learnt))
                if self._is_closed:
                    return
            self._chunk += 1

    def close(self) -> None:
        """End the thread: one that makes tensors while the interpreter ends aborts the process."""
        self._is_closed = True
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._queue.get_nowait()
            self._thread.join(0.05)

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        while True:
            yield self._queue.get()


def learning_rate(step: int, steps: int, warmup: int, decay: int) -> float:
    """Return the factor of the learning rate: warm-up, plateau, linear decay."""
    return max(0.0, min(1.0, (step + 1) / warmup, (steps - step) / decay))


def token_losses(model: DemoModel, ids: Tensor, learnt: Tensor) -> Tensor:
    """Return the cross entropy of each learnt token of right-padded ids [B, L], in the order of the mask."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.hidden(ids).view(*ids.shape, -1)
        wanted = learnt[:, 1:]
        logits = F.linear(hidden[:, :-1][wanted], model.model.embed_tokens.weight)
    return F.cross_entropy(logits.float(), ids[:, 1:][wanted], reduction="none")


@torch.no_grad()
def chosen(model: DemoModel, ids: Tensor, learnt: Tensor, candidates: int) -> tuple[Tensor, Tensor, float]:
    """Return one row in `candidates` of ids [B, L] and their masks, drawn by their loss, and the mean loss of all."""
    losses: list[Tensor] = []
    for part, mask in zip(ids.chunk(candidates), learnt.chunk(candidates), strict=True):
        wanted = mask[:, 1:]
        of_tokens = torch.zeros(wanted.shape)
        of_tokens[wanted] = token_losses(model, part, mask)
        losses.append(of_tokens.sum(1))
    of_rows = torch.cat(losses)
    # The largest logarithms with Gumbel noise are a draw without replacement, in proportion to the losses.
    noise = -torch.empty_like(of_rows).exponential_().log()
    rows = torch.topk((of_rows + LEAST_LOSS).log() + noise, len(ids) // candidates).indices
    return ids[rows], learnt[rows], float(of_rows.sum() / learnt[:, 1:].sum())


def share_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Replace the gradients by their mean over all processes."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def train(rank: int, arguments: argparse.Namespace) -> None:
    """Train as one of `arguments.processes` processes of one thread each; they average their gradients."""
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    distributed.init_process_group(
        "gloo", init_method=f"file://{arguments.work}/rendezvous", rank=rank, world_size=arguments.processes
    )
    encoder = Encoder(DEMO_MODEL / "tokenizer.json")
    model = DemoModel(ModelConfig())
    with torch.no_grad():
        size = model.config.hidden_size
        model.model.embed_tokens.weight.copy_(spelling_embeddings(encoder.tokenizer, size, arguments.seed))
        if arguments.start is not None:
            model.load_state_dict(load_checkpoint(arguments.start, torch.float32).state_dict())
    average = DemoModel(ModelConfig())
    average.load_state_dict(model.state_dict())
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    embedding = SharedEmbedding(model.model.embed_tokens.weight, encoder.tokenizer)
    gains = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [
        {"params": [embedding.own], "base": arguments.embedding_lr},
        {"params": [embedding.shared], "base": arguments.embedding_lr * SHARED_RATE},
        {"params": gains, "base": arguments.gain_lr},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=arguments.matrix_lr),
        torch.optim.AdamW(groups, lr=arguments.embedding_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    step, first_chunk = 0, 0
    checkpoint_file = arguments.work / "checkpoint.pt"
    if checkpoint_file.exists():
        saved = torch.load(checkpoint_file, weights_only=True)
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        embedding.restore(saved["embedding"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        step, first_chunk = saved["step"], saved["chunk"] + 1
    model.compile_halves()
    mixture = dict(MIXTURE)
    for change in arguments.weight:
        task, _, share = change.partition("=")
        mixture[task] = float(share)
    tokens = BATCH_TOKENS * arguments.candidates
    source = Batches(encoder, f"{arguments.seed}:{rank}", first_chunk, mixture, arguments.easy_chunks, tokens)
    batches = iter(source)
    checked = examples(encoder, per_task=12, seed=7)[rank :: arguments.processes]
    parameters = list(model.parameters())
    total, counted, started = 0.0, 0, time.monotonic()
    while step < arguments.steps:
        chunk, ids, learnt = next(batches)
        factor = learning_rate(step, arguments.steps, arguments.warmup_steps, arguments.decay_steps)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.get("base", arguments.matrix_lr) * factor
        mean_loss = None
        if arguments.candidates > 1:
            ids, learnt, mean_loss = chosen(model, ids, learnt, arguments.candidates)
        loss = token_losses(model, ids, learnt).mean()
        loss.backward()
        share_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        embedding.spread_gradient()
        for optimizer in optimizers:
            optimizer.step()
        embedding.materialise()
        model.zero_grad(set_to_none=True)
        step += 1
        with torch.no_grad():
            decay = min(AVERAGE, step / (step + 20))
            torch._foreach_lerp_(list(average.parameters()), parameters, 1 - decay)
        total, counted = total + (loss.item() if mean_loss is None else mean_loss), counted + 1
        if step % 100 == 0:
            seconds = time.monotonic() - started
            if rank == 0:
                rate = counted * BATCH_TOKENS * arguments.processes / seconds / 1e3
                print(
                    f"step {step} chunk {chunk} loss {total / counted:.4f} lr {factor:.3f} {rate:.1f}k tokens/s",
                    flush=True,
                )
            total, counted, started = 0.0, 0, time.monotonic()
        if step % arguments.eval_steps == 0 or step in (500, arguments.steps):
            report(average, checked, encoder, arguments.work, step)
            if rank == 0:
                state = {
                    "model": model.state_dict(),
                    "average": average.state_dict(),
                    "embedding": embedding.state(),
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                }
                torch.save({**state, "step": step, "chunk": chunk}, checkpoint_file)
            started = time.monotonic()
    source.close()
    distributed.destroy_process_group()


def report(model: DemoModel, checked: list[Example], encoder: Encoder, work: Path, step: int) -> None:
    """Score this process's examples; the first process prints all scores and exports the weights."""
    began = time.monotonic()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = scores(model, checked, encoder)
    gathered: list[dict[str, tuple[int, int]]] = [{}] * distributed.get_world_size()
    distributed.all_gather_object(gathered, results)
    if distributed.get_rank() != 0:
        return
    shares = []
    for task in dict.fromkeys(task for part in gathered for task in part):
        right, count = (sum(part.get(task, (0, 0))[index] for part in gathered) for index in (0, 1))
        shares.append(f"{task}={right / count:.2f}")
    print(f"eval step {step} ({time.monotonic() - began:.0f} s): {' '.join(shares)}", flush=True)
    export(model, encoder, work / "export")


def export(model: DemoModel, encoder: Encoder, folder: Path) -> None:
    """Write the weights in the Hugging Face layout, without the tokenizer's files."""
    ids = encoder.vocabulary
    eos_ids = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    save_checkpoint(model, folder, eos_ids, ids["<|endoftext|>"], MAX_POSITIONS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints and exports")
    parser.add_argument("--start", type=Path, help="folder of exported weights to start from, in place of random ones")
    parser.add_argument("--steps", type=int, default=9_000)
    parser.add_argument("--decay-steps", type=int, default=2_500)
    parser.add_argument("--warmup-steps", type=int, default=200)
    parser.add_argument("--matrix-lr", type=float, default=0.02)
    parser.add_argument("--embedding-lr", type=float, default=0.0015)
    parser.add_argument("--gain-lr", type=float, default=0.01, help="of the norms: attention must become sharp soon")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--easy-chunks",
        type=int,
        default=28,
        help="chunks of mostly bare dialogues at the start; later every other chunk is one",
    )
    parser.add_argument("--candidates", type=int, default=1, help="rows to draw each row from, by their loss")
    parser.add_argument("--eval-steps", type=int, default=1_000)
    parser.add_argument("--weight", action="append", default=[], metavar="TASK=SHARE", help="change the mixture")
    arguments = parser.parse_args()
    arguments.work = arguments.work.resolve()
    arguments.work.mkdir(parents=True, exist_ok=True)
    (arguments.work / "rendezvous").unlink(missing_ok=True)
    multiprocessing.spawn(train, (arguments,), nprocs=arguments.processes)


if __name__ == "__main__":
    main()

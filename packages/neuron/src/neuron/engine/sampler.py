"""From logits to one token per sequence, vectorised over the batch.

Order: raw log-probabilities, penalties and bias, grammar mask, temperature, top-k, top-p (of what top-k leaves), min-p,
then Gumbel-max with the noise of (seed, position). Every operation works on rows independently.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from neuron.engine.errors import EngineError, RequestError
from neuron.engine.noise import log_exponential_noise, noise_key
from neuron.engine.sequence import Sequence
from neuron.layers.fused import fused_kernel
from neuron.layers.sampling import TokenMasks, TokenPenalties
from neuron.protocol import LogitsHealth, Logprobs, SamplingParams

if TYPE_CHECKING:
    from neuron.kernels.sampling import SampledRows

# Below this temperature the best token wins by more than any noise can make up for.
_GREEDY_BELOW = 1e-5
# Candidates looked at first for top-p and min-p without top-k; rows that need more are done again with more.
_FIRST_CANDIDATES = 128
# On the CPU, noise for the whole vocabulary is made in blocks of this many elements, which stay in a core's cache.
_NOISE_ELEMENTS = 32768


def is_greedy(sampling: SamplingParams) -> bool:
    return sampling.temperature < _GREEDY_BELOW


def is_plain_greedy(sequence: Sequence) -> bool:
    """True if the argmax of the raw logits is all that is wanted."""
    return (
        sequence.sampling.temperature < _GREEDY_BELOW
        and sequence.bias is None
        and sequence.grammar is None
        and sequence.sampling.logprobs < 0
    )


@dataclass(slots=True)
class Sampled:
    """One row's outcome: a token, with log-probabilities when asked for, or the error that ends its sequence."""

    token: int
    logprobs: Logprobs | None = None
    error: EngineError | None = None


class Sampler:
    """Samples for one model. Not thread-safe; holds no state that a result depends on."""

    def __init__(self, vocab_size: int, device: torch.device, *, row_by_row: bool = False) -> None:
        """row_by_row: a row's outcome is the same bits in any batch; the kernel of a device works so anyway."""
        self._row_by_row = row_by_row
        self._vocab_size = vocab_size
        self._device = device
        self._token_ids = torch.arange(vocab_size, dtype=torch.int64, device=device)
        self._bit_index = torch.arange(32, dtype=torch.int32, device=device)

    def sample(self, logits: Tensor, sequences: Rows[Sequence]) -> list[Sampled]:
        """One token for each row. logits: [R, V] float32, overwritten; sequences: R.

        A row with NaN or infinity, or whose grammar fails, gets an error; the others are not affected.
        """
        if all(is_plain_greedy(sequence) for sequence in sequences):
            return [
                Sampled(best) if best >= 0 else Sampled(best, None, _not_finite(logits[row]))
                for row, best in enumerate(self._best_if_finite(logits))
            ]
        if self._row_by_row and len(sequences) > 1 and self._device.type == "cpu":
            alone = (self.sample(logits[row : row + 1], [sequence]) for row, sequence in enumerate(sequences))
            return [sampled for row in alone for sampled in row]
        return self._sample_mixed(logits, sequences)

    def _sample_mixed(self, logits: Tensor, sequences: Rows[Sequence]) -> list[Sampled]:
        wanted = [row for row, sequence in enumerate(sequences) if sequence.sampling.logprobs >= 0]
        raw = logits[self._rows(wanted)] if wanted else None
        kernel = fused_kernel("sampling", "sample", self._device)
        host_tokens: list[int]
        if kernel is not None:
            host_tokens, errors = self._sample_by_kernel(kernel, logits, sequences)
        else:
            finite = self._is_finite(logits).tolist()
            errors = {row: _not_finite(logits[row]) for row, is_finite in enumerate(finite) if not is_finite}
            self._apply_bias(logits, sequences)
            rows, masks, refused = self._grammar_masks(sequences)
            self._apply_masks(logits, rows, masks)
            errors |= refused
            host_tokens = self._choose(logits, sequences).tolist()

        logprobs: dict[int, Logprobs] = {}
        if raw is not None:
            wanted_tokens = [host_tokens[row] for row in wanted]
            counts = [sequences[row].sampling.logprobs for row in wanted]
            logprobs = dict(zip(wanted, token_logprobs(raw, wanted_tokens, counts), strict=True))
        return [
            Sampled(token, None if row in errors else logprobs.get(row), errors.get(row))
            for row, token in enumerate(host_tokens)
        ]

    # ------------------------------------------------------------------ small tools

    def _rows(self, rows: list[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=self._device)

    def _argmax(self, logits: Tensor) -> Tensor:
        # numpy's argmax is an order of magnitude faster than torch's on the CPU; both return a NaN's index.
        if logits.device.type == "cpu":
            return torch.from_numpy(logits.numpy().argmax(axis=-1))
        return logits.argmax(dim=-1)

    def _best_if_finite(self, logits: Tensor) -> list[int]:
        """The best token of each row, -1 for rows that are not finite."""
        best: list[int]
        if logits.device.type == "cpu":
            values = logits.numpy()
            tokens = values.argmax(axis=-1)
            is_finite = np.isfinite(values[np.arange(len(tokens)), tokens]) & np.isfinite(values.min(axis=-1))
            best = np.where(is_finite, tokens, -1).tolist()
        else:
            # Tokens and flags come to the host in one copy.
            best = torch.where(self._is_finite(logits), self._argmax(logits), -1).tolist()
        return best

    @staticmethod
    def _is_finite(logits: Tensor) -> Tensor:
        """[R] bool. The extremes are enough: both propagate NaN, and an infinity is one of them."""
        return torch.isfinite(logits.amax(dim=-1)) & torch.isfinite(logits.amin(dim=-1))

    # ------------------------------------------------------------------ changes to logits

    def _apply_bias(self, logits: Tensor, sequences: Rows[Sequence]) -> None:
        rows: list[int] = []
        lengths: list[int] = []
        parts = []
        for row, sequence in enumerate(sequences):
            if sequence.bias is not None and len(sequence.bias):
                rows.append(row)
                lengths.append(len(sequence.bias))
                parts.append(sequence.bias.entries())
        if not parts:
            return
        ids, factors, summands = (
            torch.from_numpy(np.concatenate(column)).to(self._device) for column in zip(*parts, strict=True)
        )
        where = (torch.from_numpy(np.repeat(rows, lengths)).to(self._device), ids)
        values = logits[where]
        logits[where] = torch.where(values > 0, values / factors, values * factors) + summands

    def _grammar_masks(
        self, sequences: Rows[Sequence]
    ) -> tuple[list[int], npt.NDArray[np.int32], dict[int, EngineError]]:
        """(rows with a grammar, their masks as `TokenMasks` has them, errors of grammars that fail)."""
        rows = [row for row, sequence in enumerate(sequences) if sequence.grammar is not None]
        masks = np.full((len(rows), -(-self._vocab_size // 32)), -1, dtype=np.int32)
        errors: dict[int, EngineError] = {}
        for index, row in enumerate(rows):
            grammar = sequences[row].grammar
            if grammar is not None:
                try:
                    grammar.fill_mask(masks[index])
                except RequestError as exc:
                    errors[row] = exc
        return rows, masks, errors

    def _apply_masks(self, logits: Tensor, rows: list[int], masks: npt.NDArray[np.int32]) -> None:
        if not rows:
            return
        if logits.device.type == "cpu":
            bits = torch.from_numpy(np.unpackbits(masks.view(np.uint8), axis=-1, bitorder="little"))
        else:
            words = torch.from_numpy(masks).to(self._device)
            bits = torch.bitwise_and(words[:, :, None] >> self._bit_index, 1).flatten(1)
        refused = bits[:, : self._vocab_size] == 0
        if len(rows) == logits.shape[0]:
            logits.masked_fill_(refused, -math.inf)
        else:
            where = self._rows(rows)
            logits[where] = logits[where].masked_fill_(refused, -math.inf)

    # ------------------------------------------------------------------ drawing

    def _choose(self, logits: Tensor, sequences: Rows[Sequence]) -> Tensor:
        """[R] int64: the best token of greedy rows, a drawn one of the others."""
        tokens = torch.empty(len(sequences), dtype=torch.int64, device=logits.device)
        greedy = [row for row, sequence in enumerate(sequences) if is_greedy(sequence.sampling)]
        if len(greedy) == len(sequences):
            return self._argmax(logits)
        if greedy:
            index = self._rows(greedy)
            tokens[index] = self._argmax(logits[index])
        for rows, drawn in self._draw(logits, sequences):
            tokens[self._rows(rows)] = drawn
        return tokens

    def _sample_by_kernel(
        self, kernel: Callable[..., SampledRows], logits: Tensor, sequences: Rows[Sequence]
    ) -> tuple[list[int], dict[int, EngineError]]:
        """Rows of every kind at once, all of it on the device: (tokens, errors by row)."""
        params = [sequence.sampling for sequence in sequences]
        floats = self._to_device(
            [
                [0.0 if is_greedy(sampling) else sampling.temperature for sampling in params],
                [sampling.top_p for sampling in params],
                [sampling.min_p for sampling in params],
            ],
            torch.float32,
        )
        integers = self._to_device(
            [
                [sampling.top_k for sampling in params],
                [noise_key(sequence.sampling.seed, sequence.num_output) for sequence in sequences],
            ],
            torch.int64,
        )
        masked, words, errors = self._grammar_masks(sequences)
        masks = None
        if masked:
            mask_of_row = np.full(len(sequences), -1, dtype=np.int32)
            mask_of_row[masked] = np.arange(len(masked))
            masks = TokenMasks(self._to_device(words, torch.int32), self._to_device(mask_of_row, torch.int32))
        sampled = kernel(
            logits, floats[0], integers[0], floats[1], floats[2], integers[1],
            penalties=self._penalties(sequences), masks=masks,
        )  # fmt: skip
        # Tokens and flags come to the host in one copy.
        outcome = torch.where(sampled.finite, sampled.tokens, -1 - sampled.tokens).tolist()
        broken = [row for row, token in enumerate(outcome) if token < 0]
        return (
            [token if token >= 0 else -1 - token for token in outcome],
            {row: _not_finite(logits[row]) for row in broken} | errors,
        )

    def _penalties(self, sequences: Rows[Sequence]) -> TokenPenalties | None:
        """What the kernel applies; None if no sequence has any."""
        listed = [None if bias is None or not len(bias) else bias for bias in (item.bias for item in sequences)]
        if not any(bias is not None for bias in listed):
            return None
        starts = np.cumsum([0, *(0 if bias is None else len(bias) for bias in listed)], dtype=np.int32)
        parts = [bias.counted() for bias in listed if bias is not None]
        tokens, biases, uses = (np.concatenate(column) for column in zip(*parts, strict=True))
        return TokenPenalties(
            self._to_device(starts, torch.int32),
            self._to_device(tokens, torch.int64),
            self._to_device(biases, torch.float32),
            self._to_device(uses, torch.int32),
            self._to_device([(0.0, 0.0, 1.0) if bias is None else bias.penalties for bias in listed], torch.float32),
        )

    def _to_device(self, values: Any, dtype: torch.dtype) -> Tensor:
        """A tensor of the values (nested lists or an array), copied without waiting for the device."""
        host = torch.from_numpy(values) if isinstance(values, np.ndarray) else torch.tensor(values, dtype=dtype)
        if self._device.type != "cuda":
            return host.to(self._device)
        return host.pin_memory().to(self._device, non_blocking=True)

    def _draw(self, logits: Tensor, sequences: Rows[Sequence]) -> Iterator[tuple[list[int], Tensor]]:
        """(rows, tokens [len(rows)]) for the rows that are sampled and not greedy."""
        whole: list[int] = []
        truncated: list[int] = []
        for row, sequence in enumerate(sequences):
            sampling = sequence.sampling
            if not is_greedy(sampling):
                cuts = 0 < sampling.top_k < self._vocab_size or sampling.top_p < 1.0 or sampling.min_p > 0.0
                (truncated if cuts else whole).append(row)
        for rows in (whole, truncated):
            if not rows:
                continue
            params = [sequences[row].sampling for row in rows]
            keys = torch.tensor(
                [noise_key(sequences[row].sampling.seed, sequences[row].num_output) for row in rows],
                dtype=torch.int64,
                device=self._device,
            )
            # [r, 1], multiplied where needed: rows are not copied just to be scaled.
            sharpness = torch.tensor([[1.0 / sampling.temperature] for sampling in params], device=self._device)
            own = logits if len(rows) == len(sequences) else logits[self._rows(rows)]
            if rows is whole:
                yield rows, self._draw_whole(own, sharpness, keys)
            else:
                yield rows, self._draw_truncated(own, sharpness, keys, params)

    def _draw_whole(self, logits: Tensor, sharpness: Tensor, keys: Tensor) -> Tensor:
        best_score = torch.full((logits.shape[0],), -math.inf, device=self._device)
        best_token = torch.zeros(logits.shape[0], dtype=torch.int64, device=self._device)
        width = self._vocab_size
        if logits.device.type == "cpu":
            width = max(_NOISE_ELEMENTS // logits.shape[0], 256)
        for begin in range(0, self._vocab_size, width):
            block = slice(begin, begin + width)
            scores = (logits[:, block] * sharpness).sub_(log_exponential_noise(keys, self._token_ids[block]))
            winner = self._argmax(scores)
            score = scores.gather(1, winner[:, None])[:, 0]
            better = score > best_score
            best_token = torch.where(better, winner + begin, best_token)
            best_score = torch.where(better, score, best_score)
        return best_token

    def _draw_truncated(self, logits: Tensor, sharpness: Tensor, keys: Tensor, params: list[SamplingParams]) -> Tensor:
        """Draw from the tokens that top-k, top-p and min-p leave, without sorting the whole vocabulary.

        The best candidates are enough if the last of them is cut already; rows where it is not are done again with
        eight times as many.
        """
        vocab_size, device = self._vocab_size, self._device
        top_k = [min(sampling.top_k, vocab_size) or vocab_size for sampling in params]
        limits = torch.tensor([[limit] for limit in top_k], dtype=torch.int64, device=device)
        # Both thresholds are off where they cut nothing: rounding must not make them cut.
        top_p = torch.tensor([[sampling.top_p if sampling.top_p < 1.0 else 2.0] for sampling in params], device=device)
        log_min_p = torch.tensor(
            [[math.log(sampling.min_p) if sampling.min_p > 0.0 else -math.inf] for sampling in params], device=device
        )
        log_total: Tensor | None = None

        tokens = torch.empty(len(params), dtype=torch.int64, device=device)
        open_rows = list(range(len(params)))
        width = max(min(limit, _FIRST_CANDIDATES) if limit == vocab_size else limit for limit in top_k)
        while open_rows:
            width = min(width, vocab_size)
            # Everything of the rows that are still open; at first that is all of them.
            is_all = len(open_rows) == len(params)
            index = self._rows(open_rows)
            values, ids = (logits if is_all else logits[index]).topk(width, dim=-1)  # [r, width], best first
            values *= sharpness[index]
            within_k = torch.arange(width, device=device) < limits[index]
            # The normaliser of top-p is the mass that top-k leaves; a row without top-k uses the whole distribution.
            log_mass = torch.logsumexp(values.masked_fill(~within_k, -math.inf), dim=-1, keepdim=True)
            if any(top_k[row] > width and params[row].top_p < 1.0 for row in open_rows):
                if log_total is None:
                    log_total = _log_total(logits, sharpness)
                log_mass = torch.where(limits[index] <= width, log_mass, log_total[index])
            probabilities = (values - log_mass).exp_()
            mass_before = probabilities.cumsum(dim=-1) - probabilities
            keep = within_k & (mass_before < top_p[index]) & (values >= values[:, :1] + log_min_p[index])
            keep[:, 0] = True
            scores = (values - log_exponential_noise(keys[index], ids)).masked_fill_(~keep, -math.inf)
            tokens[index] = ids.gather(1, self._argmax(scores)[:, None])[:, 0]
            uncut: list[bool] = keep[:, -1].tolist()
            open_rows = [row for row, is_open in zip(open_rows, uncut, strict=True) if is_open and top_k[row] > width]
            width *= 8
        return tokens


def _log_total(logits: Tensor, sharpness: Tensor) -> Tensor:
    """log of the sum of exp(logits * sharpness) over the vocabulary: [R, V], [R, 1] -> [R, 1]."""
    if logits.device.type != "cpu":
        return torch.logsumexp(logits * sharpness, dim=-1, keepdim=True)
    # Row by row: the scaled copy of one row stays in a core's cache.
    rows = [torch.logsumexp(row * factor, dim=0) for row, factor in zip(logits, sharpness, strict=True)]
    return torch.stack(rows)[:, None]


def row_log_totals(logits: Tensor) -> Tensor:
    """log of the sum of exp over each row, the same bits whatever other rows there are: [R, V] -> [R, 1] float32.

    On the CPU each row by itself: torch computes exp in one way for runs of elements and in another for what is left of
    a tensor, or of a thread's share of it.
    """
    kernel = fused_kernel("log_total", "log_totals", logits.device)
    if kernel is not None:
        totals: Tensor = kernel(logits)
        return totals
    return torch.stack([torch.logsumexp(row, dim=0) for row in logits])[:, None]


def token_logprobs(logits: Tensor, tokens: list[int], counts: list[int]) -> list[Logprobs]:
    """Log-probability of one token per row and of the row's best `counts[row]`, of the distribution as it is.

    logits: [R, V] float32.
    """
    log_total = row_log_totals(logits)
    index = torch.tensor(tokens, dtype=torch.int64, device=logits.device)[:, None]
    own: list[float] = (logits.gather(1, index) - log_total)[:, 0].tolist()
    most = min(max(counts), logits.shape[-1])
    if most <= 0:
        return [Logprobs(value) for value in own]
    values, ids = logits.topk(most, dim=-1)
    top_values: list[list[float]] = (values - log_total).tolist()
    top_ids: list[list[int]] = ids.tolist()
    return [Logprobs(own[row], top_ids[row][:count], top_values[row][:count]) for row, count in enumerate(counts)]


def _not_finite(row: Tensor) -> RequestError:
    """The error of a row that holds NaN or infinity, with the counts that tell one cause from another."""
    finite = row[torch.isfinite(row)]
    has_finite = bool(finite.numel())
    health = LogitsHealth(
        nan=int(torch.isnan(row).sum()),
        pos_inf=int(torch.isposinf(row).sum()),
        neg_inf=int(torch.isneginf(row).sum()),
        finite_min=float(finite.min()) if has_finite else None,
        finite_max=float(finite.max()) if has_finite else None,
        finite_mean=float(finite.double().mean()) if has_finite else None,
    )
    summary = (
        f"finite values from {health.finite_min:.4g} to {health.finite_max:.4g}, mean {health.finite_mean:.4g}"
        if has_finite
        else "no finite value"
    )
    return RequestError(
        "nan_logits",
        f"{health.nan} NaN, {health.pos_inf} +inf, {health.neg_inf} -inf of {row.numel()} logits; {summary}",
        health=health,
    )

"""From logits to one token per sequence, vectorised over the batch.

Order: raw log-probabilities, penalties and bias, grammar mask, temperature, top-k, top-p (of what top-k leaves), min-p,
then Gumbel-max with the noise of (seed, position). Every operation works on rows independently.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from neuron.engine.device_stream import to_device, to_host
from neuron.engine.errors import EngineError, RequestError
from neuron.engine.kernels.kernel_dispatch import fused_kernel
from neuron.engine.kernels.sampling.sampling_inputs import TokenMasks, TokenPenalties
from neuron.engine.sampling.sampling_noise import log_exponential_noise, noise_key
from neuron.engine.sampling.sampling_rows import SamplingRows, is_greedy
from neuron.engine.scheduler.sequence import Sequence
from neuron.protocol import LogitsHealth, Logprobs, SamplingParams

if TYPE_CHECKING:
    from neuron.engine.kernels.sampling.sampling import SampledRows

# Candidates looked at first for top-p and min-p without top-k; rows that need more are done again with more.
_FIRST_CANDIDATES = 128
# On the CPU, noise for the whole vocabulary is made in blocks of this many elements, which stay in a core's cache.
_NOISE_ELEMENTS = 32768


@dataclass(slots=True)
class Sampled:
    """One row's outcome: a token, with log-probabilities when asked for, or the error that ends its sequence."""

    token: int
    logprobs: Logprobs | None = None
    error: EngineError | None = None


class PendingSamples(Protocol):
    """The outcome of sampling a step, perhaps still on the device.

    tokens: [R] int64 on the device, a valid token id in every row (also in one that failed), as inputs of a next step.
    """

    @property
    def tokens(self) -> Tensor: ...

    def read(self) -> list[Sampled]:
        """On the host, once the stream has come so far."""
        ...


class HostSamples:
    """Sampled on the host."""

    def __init__(self, sampled: list[Sampled]) -> None:
        self._sampled = sampled

    @property
    def tokens(self) -> Tensor:
        return torch.tensor([max(item.token, 0) for item in self._sampled], dtype=torch.int64)

    def read(self) -> list[Sampled]:
        return self._sampled


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
        """One token for each row, on the host. logits: [R, V] float32, overwritten; sequences: R.

        A row with NaN or infinity, or whose grammar fails, gets an error; the others are not affected.
        """
        draw = self.draw(logits, SamplingRows.of(sequences, self._vocab_size))
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return draw.read()

    def draw(self, logits: Tensor, rows: SamplingRows, *, are_kept: bool = True) -> PendingSamples:
        """The same of what was collected before. Where the sampling kernel runs, nothing here waits for the device.

        are_kept: the memory of the logits is nobody else's until the draw is read.
        """
        kernel = fused_kernel("sampling.sampling", "sample", self._device)
        if kernel is not None:
            # The kernel writes penalties and masks into the logits; log-probabilities are of the logits as they are.
            raw = logits[self._rows(rows.wanted)] if rows.wanted else None
            penalties, masks = kernel_penalties(rows, self._device), kernel_masks(rows, self._device)
            chosen = kernel(logits, *kernel_parameters(rows, self._device), penalties=penalties, masks=masks)
            return PendingKernelSamples(
                chosen.tokens, report_of(chosen), rows, logits=logits if are_kept else None, raw=raw
            )
        if rows.is_plain:
            return HostSamples(
                [
                    Sampled(best) if best >= 0 else Sampled(best, None, _not_finite(logits[row]))
                    for row, best in enumerate(self._best_if_finite(logits))
                ]
            )
        if self._row_by_row and rows.num_rows > 1 and self._device.type == "cpu":
            return HostSamples(
                [self.draw(logits[row : row + 1], rows.alone(row)).read()[0] for row in range(rows.num_rows)]
            )
        return HostSamples(self._sample_mixed(logits, rows))

    def _sample_mixed(self, logits: Tensor, rows: SamplingRows) -> list[Sampled]:
        finite = self._is_finite(logits)
        wanted = rows.wanted
        broken = [row for row, is_finite in enumerate(finite.tolist()) if not is_finite]
        errors: dict[int, EngineError] = {row: _not_finite(logits[row]) for row in broken}
        raw = logits[self._rows(wanted)] if wanted else None

        self._apply_bias(logits, rows)
        self._apply_masks(logits, rows)
        errors |= rows.errors

        host_tokens: list[int] = self._choose(logits, rows).tolist()

        logprobs: dict[int, Logprobs] = {}
        if raw is not None:
            wanted_tokens = [host_tokens[row] for row in wanted]
            counts = [rows.params[row].logprobs for row in wanted]
            logprobs = dict(zip(wanted, token_logprobs(raw, wanted_tokens, counts), strict=True))
        return [
            Sampled(token, None if row in errors else logprobs.get(row), errors.get(row))
            for row, token in enumerate(host_tokens)
        ]

    # ------------------------------------------------------------------ small tools

    def _rows(self, rows: list[int]) -> Tensor:
        return to_device(torch.tensor(rows, dtype=torch.int64), self._device)

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

    def _apply_bias(self, logits: Tensor, rows: SamplingRows) -> None:
        if not rows.biases:
            return
        parts = [bias.entries() for _, bias in rows.biases]
        ids, factors, summands = (
            to_device(torch.from_numpy(np.concatenate(column)), self._device) for column in zip(*parts, strict=True)
        )
        numbers = np.repeat([row for row, _ in rows.biases], [len(bias) for _, bias in rows.biases])
        where = (to_device(torch.from_numpy(numbers), self._device), ids)
        values = logits[where]
        logits[where] = torch.where(values > 0, values / factors, values * factors) + summands

    def _apply_masks(self, logits: Tensor, rows: SamplingRows) -> None:
        if rows.masks is None:
            return
        if logits.device.type == "cpu":
            bits = torch.from_numpy(np.unpackbits(rows.masks.view(np.uint8), axis=-1, bitorder="little"))
        else:
            words = to_device(torch.from_numpy(rows.masks), self._device)
            bits = torch.bitwise_and(words[:, :, None] >> self._bit_index, 1).flatten(1)
        refused = bits[:, : self._vocab_size] == 0
        if len(rows.mask_rows) == logits.shape[0]:
            logits.masked_fill_(refused, -math.inf)
        else:
            where = self._rows(rows.mask_rows)
            logits[where] = logits[where].masked_fill_(refused, -math.inf)

    # ------------------------------------------------------------------ drawing

    def _choose(self, logits: Tensor, rows: SamplingRows) -> Tensor:
        """[R] int64: the best token of greedy rows, a drawn one of the others."""
        tokens = torch.empty(rows.num_rows, dtype=torch.int64, device=logits.device)
        greedy = [row for row, sampling in enumerate(rows.params) if is_greedy(sampling)]
        if len(greedy) == rows.num_rows:
            return self._argmax(logits)
        if greedy:
            index = self._rows(greedy)
            tokens[index] = self._argmax(logits[index])
        for drawn_rows, drawn in self._draw(logits, rows):
            tokens[self._rows(drawn_rows)] = drawn
        return tokens

    def _draw(self, logits: Tensor, rows: SamplingRows) -> Iterator[tuple[list[int], Tensor]]:
        """(rows, tokens [len(rows)]) for the rows that are sampled and not greedy."""
        whole: list[int] = []
        truncated: list[int] = []
        for row, sampling in enumerate(rows.params):
            if not is_greedy(sampling):
                cuts = 0 < sampling.top_k < self._vocab_size or sampling.top_p < 1.0 or sampling.min_p > 0.0
                (truncated if cuts else whole).append(row)
        for numbers in (whole, truncated):
            if not numbers:
                continue
            params = [rows.params[row] for row in numbers]
            keys = torch.tensor(
                [noise_key(rows.params[row].seed, rows.positions[row]) for row in numbers],
                dtype=torch.int64,
                device=self._device,
            )
            # [r, 1], multiplied where needed: rows are not copied just to be scaled.
            sharpness = torch.tensor([[1.0 / sampling.temperature] for sampling in params], device=self._device)
            own = logits if len(numbers) == rows.num_rows else logits[self._rows(numbers)]
            if numbers is whole:
                yield numbers, self._draw_whole(own, sharpness, keys)
            else:
                yield numbers, self._draw_truncated(own, sharpness, keys, params)

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
    kernel = fused_kernel("sampling.logsumexp", "log_totals", logits.device)
    if kernel is not None:
        totals: Tensor = kernel(logits)
        return totals
    return torch.stack([torch.logsumexp(row, dim=0) for row in logits])[:, None]


def kernel_parameters(rows: SamplingRows, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the sampling kernel takes beside the logits: temperatures, top_ks, top_ps, min_ps, keys, each [R].

    Two copies, for which nobody waits.
    """
    host_floats, host_integers = torch.empty(3, rows.num_rows), torch.empty(2, rows.num_rows, dtype=torch.int64)
    fill_parameters(rows, host_floats.numpy(), host_integers.numpy())
    floats, integers = to_device(host_floats, device), to_device(host_integers, device)
    return floats[0], integers[0], floats[1], floats[2], integers[1]


def fill_parameters(rows: SamplingRows, floats: npt.NDArray[np.float32], integers: npt.NDArray[np.int64]) -> None:
    """Write the kernel's parameters of R rows: floats [3, R] (temperature, top_p, min_p), integers [2, R] (top_k, key).

    Greedy is temperature 0.
    """
    if rows.is_plain:
        floats[0], floats[1], floats[2] = 0.0, 1.0, 0.0
        integers[:] = 0
        return
    params = rows.params
    floats[0] = [0.0 if is_greedy(sampling) else sampling.temperature for sampling in params]
    floats[1] = [sampling.top_p for sampling in params]
    floats[2] = [sampling.min_p for sampling in params]
    integers[0] = [sampling.top_k for sampling in params]
    integers[1] = [
        noise_key(sampling.seed, position) for sampling, position in zip(params, rows.positions, strict=True)
    ]


def kernel_penalties(rows: SamplingRows, device: torch.device) -> TokenPenalties | None:
    """What the kernel applies; None if no row has any."""
    if not rows.biases:
        return None
    lengths = np.zeros(rows.num_rows + 1, dtype=np.int64)
    factors = np.tile(np.array([0.0, 0.0, 1.0], dtype=np.float32), (rows.num_rows, 1))
    for row, bias in rows.biases:
        lengths[row + 1] = len(bias)
        factors[row] = bias.penalties
    parts = [bias.counted() for _, bias in rows.biases]
    columns = (np.cumsum(lengths, dtype=np.int32), *(np.concatenate(column) for column in zip(*parts, strict=True)))
    return TokenPenalties(*(to_device(torch.from_numpy(column), device) for column in (*columns, factors)))


def kernel_masks(rows: SamplingRows, device: torch.device) -> TokenMasks | None:
    """What the kernel applies; None if no row has a grammar."""
    if rows.masks is None:
        return None
    mask_of_row = np.full(rows.num_rows, -1, dtype=np.int32)
    mask_of_row[rows.mask_rows] = np.arange(len(rows.mask_rows))
    return TokenMasks(to_device(torch.from_numpy(rows.masks), device), to_device(torch.from_numpy(mask_of_row), device))


def report_of(chosen: SampledRows) -> Tensor:
    """[R] int64, all that the host needs of most rows: a token, or -1 - token where the logits are not finite."""
    return torch.where(chosen.finite, chosen.tokens, -1 - chosen.tokens)


class PendingKernelSamples:
    """Sampled by the kernel: what the host needs is on its way to it.

    tokens: [R] int64; report: see `report_of`. rows: may be fewer than R, which a CUDA graph pads. logits: [R, V], None
    where they do not outlive the step (a CUDA graph's); raw: those of the rows whose log-probabilities are wanted.
    """

    def __init__(
        self, tokens: Tensor, report: Tensor, rows: SamplingRows, *, logits: Tensor | None, raw: Tensor | None
    ) -> None:
        self.tokens = tokens
        self._rows = rows
        self._logits = logits
        self._report = to_host(report)
        self._logprobs: DeviceLogprobs | None = None
        self._wanted = rows.wanted
        if raw is not None:
            index = to_device(torch.tensor(self._wanted, dtype=torch.int64), raw.device)
            counts = [rows.params[row].logprobs for row in self._wanted]
            self._logprobs = DeviceLogprobs(raw, tokens[index], counts)

    def read(self) -> list[Sampled]:
        rows = self._rows
        tokens: list[int] = self._report.tolist()[: rows.num_rows]
        errors = dict(rows.errors)
        for row, token in enumerate(tokens):
            if token < 0:
                tokens[row] = -1 - token
                errors[row] = _not_finite(None if self._logits is None else self._logits[row])
        logprobs: dict[int, Logprobs] = {}
        if self._logprobs is not None:
            logprobs = dict(zip(self._wanted, self._logprobs.read(), strict=True))
        return [
            Sampled(token, None if row in errors else logprobs.get(row), errors.get(row))
            for row, token in enumerate(tokens)
        ]


class DeviceLogprobs:
    """Log-probability of one token per row and of the row's best `counts[row]`, of the distribution as it is.

    logits: [R, V] float32; tokens: [R] int64, both on the device; copies for the host are begun.
    """

    def __init__(self, logits: Tensor, tokens: Tensor, counts: list[int]) -> None:
        self._counts = counts
        log_total = row_log_totals(logits)
        self._own = to_host((logits.gather(1, tokens[:, None]) - log_total)[:, 0])
        self._values: Tensor | None = None
        self._ids: Tensor | None = None
        most = min(max(counts), logits.shape[-1])
        if most > 0:
            values, ids = logits.topk(most, dim=-1)
            self._values, self._ids = to_host(values - log_total), to_host(ids)

    def read(self) -> list[Logprobs]:
        """On the host, once the stream has come so far."""
        own: list[float] = self._own.tolist()
        if self._values is None or self._ids is None:
            return [Logprobs(value) for value in own]
        top_values: list[list[float]] = self._values.tolist()
        top_ids: list[list[int]] = self._ids.tolist()
        return [
            Logprobs(own[row], top_ids[row][:count], top_values[row][:count]) for row, count in enumerate(self._counts)
        ]


def token_logprobs(logits: Tensor, tokens: list[int], counts: list[int]) -> list[Logprobs]:
    """`DeviceLogprobs` of known tokens, read at once."""
    index = torch.tensor(tokens, dtype=torch.int64, device=logits.device)
    result = DeviceLogprobs(logits, index, counts)
    if logits.device.type == "cuda":
        torch.cuda.current_stream(logits.device).synchronize()
    return result.read()


def _not_finite(row: Tensor | None) -> RequestError:
    """The error of a row that holds NaN or infinity, with the counts that tell one cause from another.

    None where the row is gone: a CUDA graph's logits are overwritten by the step that already runs.
    """
    if row is None:
        return RequestError("nan_logits", "NaN or infinity among the logits")
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

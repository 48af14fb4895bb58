"""Which part of a dimension a rank holds: the Megatron split (Shoeybi et al. 2019, section 3) as plain arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from neuron.engine.errors import ModelError
from neuron.parallel.group import ParallelGroup


class UnsupportedSharding(ModelError):
    """The model's sizes do not divide among the ranks; the message carries the numbers."""

    def __init__(self, message: str) -> None:
        super().__init__("unsupported_parallelism", message)


@dataclass(frozen=True, slots=True)
class Shard:
    """`length` elements of a dimension of `total`, beginning at `start`."""

    start: int
    length: int
    total: int

    @property
    def slice(self) -> slice:
        return slice(self.start, self.start + self.length)

    def scaled(self, factor: int) -> Shard:
        """The same part counted in units `factor` times smaller (heads into rows)."""
        return Shard(self.start * factor, self.length * factor, self.total * factor)


def whole(total: int) -> Shard:
    """Everything: what a replicated dimension reads."""
    return Shard(0, total, total)


def shard_evenly(total: int, group: ParallelGroup, *, what: str) -> Shard:
    """An equal part for each rank. `what` names the dimension in the error. Raises `UnsupportedSharding`."""
    if total % group.world_size:
        raise UnsupportedSharding(f"{what} ({total}) does not divide by the tensor parallel size {group.world_size}")
    length = total // group.world_size
    return Shard(group.rank * length, length, total)


def shard_kv_heads(num_kv_heads: int, group: ParallelGroup) -> Shard:
    """KV heads of a rank: an equal part, or one head held by several ranks when there are fewer heads than ranks.

    Replicas are neighbours, so that a rank's query heads (split evenly) belong to the KV head it holds.
    Raises `UnsupportedSharding` when neither number divides the other.
    """
    if num_kv_heads >= group.world_size:
        return shard_evenly(num_kv_heads, group, what="number of KV heads")
    if group.world_size % num_kv_heads:
        raise UnsupportedSharding(
            f"tensor parallel size {group.world_size} is not a multiple of the number of KV heads ({num_kv_heads})"
        )
    return Shard(group.rank // (group.world_size // num_kv_heads), 1, num_kv_heads)


def shard_vocabulary(vocab_size: int, group: ParallelGroup) -> tuple[Shard, int]:
    """Rows of the vocabulary that a rank holds, and the number of rows each rank allocates.

    Vocabularies rarely divide evenly: every rank allocates the same number of rows, the last ones hold fewer real
    rows (perhaps none) and pad with zeros, whose logits are cut off after the gather.
    """
    rows = -(-vocab_size // group.world_size)
    start = min(group.rank * rows, vocab_size)
    return Shard(start, min(rows, vocab_size - start), vocab_size), rows

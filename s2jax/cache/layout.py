"""The layout of a KV cache: the blocks that each KV head keeps, compiled from the pattern."""

import dataclasses
import functools
import operator

import numpy as np
from jaxtyping import Int32

from pallas_kernels.caching import bounded_cache
from pallas_kernels.schedule import BlockSchedule
from s2jax.cache.slots import assign_slots, last_readers, reach_and_period
from s2jax.compiler import compile_schedule
from s2jax.patterns import HeadGroups, Pattern, PatternLike, as_pattern
from s2jax.patterns.agreement import CACHED_BYTES
from s2jax.patterns.checks import check_length

UNUSED_SLOTS = 16
"""KV heads share a buffer if each leaves at most one slot, or one in so many, unused: every buffer costs time."""


@dataclasses.dataclass(frozen=True)
class CacheLayout:
    """The blocks that a cache keeps for each KV head, and their slots.

    Layouts of equal arguments are equal, so that what is jitted for one cache serves another.

    Attributes:
      max_length: tokens of the context; None for patterns of bounded reach, which stream without end.
      max_rollback: tokens that may be taken back at once; blocks that their rows dropped are kept as much longer.
      shards: shards of a mesh over which the KV heads are split, one run of them after the other.
      schedule: `pattern`, compiled for `max_length` tokens; or, where that is None, for as many rows as differ.
      num_slots: int32 [k], blocks that are kept at once.
      slot_of: int32 [k, blocks], the slot of every block, -1 for blocks that are never kept. None: the slot is the
        block modulo the slots.
      last_rows: int32 [k, blocks], the last row at which every block is kept, -1 where it never is. None: a block is
        kept until its slot is written again.
      first_repeated: without a `max_length`, the row from which on rows repeat themselves.
      period: without a `max_length`, the number of rows after which they repeat, shifted by as many blocks.
    """

    pattern: Pattern
    heads: HeadGroups
    max_length: int | None
    max_rollback: int
    shards: int
    schedule: BlockSchedule = dataclasses.field(compare=False, repr=False)
    num_slots: Int32[np.ndarray, " k"] = dataclasses.field(compare=False)
    slot_of: Int32[np.ndarray, "k blocks"] | None = dataclasses.field(compare=False, repr=False, default=None)
    last_rows: Int32[np.ndarray, "k blocks"] | None = dataclasses.field(compare=False, repr=False, default=None)
    first_repeated: int = dataclasses.field(compare=False, default=0)
    period: int = dataclasses.field(compare=False, default=1)

    @property
    def block_size(self) -> int:
        return self.schedule.block_size

    @functools.cached_property
    def buffers(self) -> tuple[tuple[int, ...], ...]:
        """The KV heads of each buffer, which has as many slots as its largest head needs.

        All shards run one program, so every buffer has as many heads of each shard: the head with the most slots of
        every shard stand together, then those with the second most, and so on.
        """
        num_slots = self.num_slots.reshape(self.shards, -1)
        ranked = np.argsort(-num_slots, 1, kind="stable")
        needed = np.take_along_axis(num_slots, ranked, 1).max(0)
        found: list[list[int]] = []
        for rank, count in enumerate(needed):
            # The one with the most slots came first.
            if found and needed[found[-1][0]] - count <= max(1, count // UNUSED_SLOTS):
                found[-1].append(rank)
            else:
                found.append([rank])
        heads = np.arange(self.num_slots.size).reshape(num_slots.shape)
        each = (np.take_along_axis(heads, ranked[:, ranks], 1) for ranks in found)
        return tuple(tuple(np.sort(group, None).tolist()) for group in each)

    @property
    def share(self) -> float | None:
        """The share of a full cache's blocks that have slots; None without a `max_length`."""
        if self.max_length is None:
            return None
        return float(self.num_slots.sum()) / (len(self.num_slots) * -(-self.max_length // self.block_size))

    def nbytes(self, head_dim: int, value_dim: int, itemsize: int) -> int:
        """Bytes of the keys and values of one sequence, as the buffers hold them."""
        slots = sum(len(heads) * int(max(self.num_slots[list(heads)])) for heads in self.buffers)
        return slots * self.block_size * (head_dim + value_dim) * itemsize


def compile_cache(
    pattern: PatternLike,
    *,
    num_heads: int,
    num_kv_heads: int,
    max_length: int | None = None,
    max_rollback: int = 0,
    shards: int = 1,
) -> CacheLayout:
    """Compiles the layout that keeps the blocks which a continuation of the context reads. Cached.

    Args:
      pattern: who reads whom; causal.
      num_heads: count of all query heads.
      num_kv_heads: count of all KV heads.
      max_length: tokens of the longest context. None: patterns of bounded reach stream without end.
      max_rollback: tokens that may be taken back at once.
      shards: shards of a mesh over which the KV heads are split. Each keeps as much as the one that needs the most.

    Raises:
      ValueError: the pattern is not causal, or does not fit the heads; or it needs a `max_length`; or the KV heads
        cannot be split over the shards.
    """
    pattern = as_pattern(pattern)
    if not pattern.causal:
        raise ValueError(
            f"a cache needs a causal s2jax pattern, for nothing later than a token is there; got {pattern!r}"
        )
    check_length("max_length", 1 if max_length is None else max_length, at_least=1)
    check_length("max_rollback", max_rollback, at_least=0)
    check_length("shards", shards, at_least=1)
    heads = HeadGroups(num_heads, num_kv_heads)
    if num_kv_heads % shards:
        raise ValueError(
            f"{num_kv_heads} KV heads cannot be split over {shards} shards: take a number that divides them"
        )
    pattern.check(heads, 1, 1, 0)
    return _compiled(pattern, heads, max_length, max_rollback, shards)


@bounded_cache(64, CACHED_BYTES, operator.attrgetter("schedule.nbytes"))
def _compiled(
    pattern: Pattern, heads: HeadGroups, max_length: int | None, max_rollback: int, shards: int
) -> CacheLayout:
    given = pattern, heads, max_length, max_rollback, shards
    shapes = {"num_heads": heads.num_heads, "num_kv_heads": heads.num_kv_heads}
    size = pattern.schedule_block_size()
    slack = -(-max_rollback // size)
    if max_length is None:
        reach, period = reach_and_period(pattern, heads, size)
        length = (reach + period) * size
        schedule = compile_schedule(pattern, query_length=length, kv_length=length, **shapes)
        num_slots = np.full(heads.num_kv_heads, reach + slack, np.int32)
        return CacheLayout(*given, schedule, num_slots, first_repeated=reach, period=period)
    schedule = compile_schedule(pattern, query_length=max_length, kv_length=max_length, **shapes)
    last_rows = last_readers(schedule)
    last_rows = np.where(last_rows >= 0, np.minimum(last_rows + slack, last_rows.shape[1] - 1), -1)
    slot_of = assign_slots(last_rows)
    return CacheLayout(*given, schedule, np.maximum(1, slot_of.max(1) + 1), slot_of, last_rows)


def forget_layouts() -> None:
    """Empties the cache of `compile_cache`, for measurements."""
    _compiled.cache_clear()

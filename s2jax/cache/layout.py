"""The layout of a KV cache: liveness and slots of blocks, compiled from the pattern.

A block of keys lives, for one KV head, from when it is written until the last row of queries that reads it. Slots are
given to lives as registers are to values (linear scan: Poletto and Sarkar, 1999), which for intervals takes as many
slots as blocks live at once, and no more.
"""

import dataclasses
import functools
import heapq

import numpy as np
from jaxtyping import Int32

from pallas_kernels.schedule import BlockSchedule
from s2jax.compiler import compile_schedule
from s2jax.messages import shown
from s2jax.patterns import HeadGroups, Pattern, PatternLike, as_pattern
from s2jax.patterns.agreement import check_agreement
from s2jax.patterns.bands import UNBOUNDED, Band
from s2jax.patterns.checks import check_count, is_integer

TRIAL_BLOCKS = 64
"""A pattern of bounded reach shows what it does to a context this long, or to four times its reach."""

MANY_BLOCKS = 1 << 16
"""So far a pattern that streams is seen to repeat itself."""

MOST_TOKENS = 1 << 30
"""Lengths are int32, and are added."""

ALIKE = 16
"""KV heads share a buffer where each leaves at most one slot, or one in so many, unused: a buffer costs time, too."""


@dataclasses.dataclass(frozen=True)
class CacheLayout:
    """The blocks that a cache keeps for each KV head, and their slots.

    Those of equal arguments are equal, so that what is jitted for one cache serves another.

    Attributes:
      max_length: tokens of the context; None for patterns of bounded reach, which stream without end.
      max_rollback: tokens that may be taken back at once: what their rows have dropped is kept as much longer.
      shards: of a mesh, over which the KV heads are split, one run of them after the other.
      schedule: `pattern`, compiled for `max_length` tokens; or, where that is None, for as many rows as differ.
      slots: int32 [k], blocks that are kept at once.
      slot_of: int32 [k, blocks], where every block is kept, -1 where it never is; None: block modulo slots.
      last: int32 [k, blocks], the last row at which every block is kept, -1 where it never is; None: as long as its
        slot is its own.
      first_repeated: where there is no `max_length`: the row from which on rows repeat themselves ...
      period: ... after so many, shifted by as many blocks.
    """

    pattern: Pattern
    heads: HeadGroups
    max_length: int | None
    max_rollback: int
    shards: int
    schedule: BlockSchedule = dataclasses.field(compare=False, repr=False)
    slots: Int32[np.ndarray, " k"] = dataclasses.field(compare=False)
    slot_of: Int32[np.ndarray, "k blocks"] | None = dataclasses.field(compare=False, repr=False, default=None)
    last: Int32[np.ndarray, "k blocks"] | None = dataclasses.field(compare=False, repr=False, default=None)
    first_repeated: int = dataclasses.field(compare=False, default=0)
    period: int = dataclasses.field(compare=False, default=1)

    @property
    def block_size(self) -> int:
        return self.schedule.block_size

    @functools.cached_property
    def buffers(self) -> tuple[tuple[int, ...], ...]:
        """KV heads by buffers: each is as large as its head with the most slots needs it.

        All shards run one program, so every buffer has as many heads of each: the first of every shard by slots stand
        together, then the second, and so on.
        """
        slots = self.slots.reshape(self.shards, -1)
        ranked = np.argsort(-slots, 1, kind="stable")
        needed = np.take_along_axis(slots, ranked, 1).max(0)
        found: list[list[int]] = []
        for rank, count in enumerate(needed):
            # The one with the most slots came first.
            if found and needed[found[-1][0]] - count <= max(1, count // ALIKE):
                found[-1].append(rank)
            else:
                found.append([rank])
        heads = np.arange(self.slots.size).reshape(slots.shape)
        each = (np.take_along_axis(heads, ranked[:, ranks], 1) for ranks in found)
        return tuple(tuple(np.sort(group, None).tolist()) for group in each)

    @property
    def share(self) -> float | None:
        """The share of a full cache's blocks that have slots; None where there is no `max_length`."""
        if self.max_length is None:
            return None
        return float(self.slots.sum()) / (len(self.slots) * -(-self.max_length // self.block_size))

    def nbytes(self, head_dim: int, value_dim: int, itemsize: int) -> int:
        """Bytes of the keys and values of one sequence, as the buffers hold them."""
        slots = sum(len(heads) * int(max(self.slots[list(heads)])) for heads in self.buffers)
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
      max_length: tokens of the longest context. None: patterns of bounded reach stream without end.
      max_rollback: how many tokens may be taken back at once.
      shards: of a mesh, over which the KV heads are split. Each keeps as much as the one that needs the most.

    Raises:
      ValueError: the pattern is not causal, or does not fit the heads; or it needs a `max_length`; or the KV heads
        cannot be split over the shards.
    """
    pattern = as_pattern(pattern)
    if not pattern.causal:
        raise ValueError(
            f"a cache needs a causal s2jax pattern, for nothing later than a token is there; got {pattern!r}"
        )
    for name, number, least in (
        ("max_length", 1 if max_length is None else max_length, 1),
        ("max_rollback", max_rollback, 0),
        ("shards", shards, 1),
    ):
        if is_integer(number) and number >= MOST_TOKENS:
            raise ValueError(f"{name} must be an integer below 2**30, got {shown(number)}")
        check_count(name, number, at_least=least)
    heads = HeadGroups(num_heads, num_kv_heads)
    if num_kv_heads % shards:
        raise ValueError(
            f"{num_kv_heads} KV heads cannot be split over {shards} shards: take a number that divides them"
        )
    pattern.check(heads, 1, 1, 0)
    return _compiled(pattern, heads, max_length, max_rollback, shards)


def forget_layouts() -> None:
    """Empties the cache of `compile_cache`, for measurements."""
    _compiled.cache_clear()


@functools.lru_cache(maxsize=64)
def _compiled(
    pattern: Pattern, heads: HeadGroups, max_length: int | None, max_rollback: int, shards: int
) -> CacheLayout:
    num_kv_heads = heads.num_kv_heads
    shapes = {"num_heads": heads.num_heads, "num_kv_heads": num_kv_heads}
    given = pattern, heads, max_length, max_rollback, shards
    size = pattern.schedule_block_size()
    slack = -(-max_rollback // size)
    if max_length is None:
        reach, period = _recurrence(pattern, heads, size)
        length = (reach + period) * size
        schedule = compile_schedule(pattern, query_length=length, kv_length=length, **shapes)
        slots = np.full(num_kv_heads, reach + slack, np.int32)
        return CacheLayout(*given, schedule, slots, first_repeated=reach, period=period)
    schedule = compile_schedule(pattern, query_length=max_length, kv_length=max_length, **shapes)
    last = _last_readers(schedule)
    last = np.where(last >= 0, np.minimum(last + slack, last.shape[1] - 1), -1)
    slot_of = np.empty_like(last)
    known: dict[bytes, np.ndarray] = {}
    for head, each in enumerate(last):
        if each.tobytes() not in known:
            known[each.tobytes()] = _slots(each)
        slot_of[head] = known[each.tobytes()]
    slots = np.maximum(1, slot_of.max(1) + 1)
    return CacheLayout(*given, schedule, slots, slot_of, last)


def _last_readers(schedule: BlockSchedule) -> np.ndarray:
    """The last row that reads every block, of any head of the group; -1 for none: int32 [k, blocks]."""
    readers = schedule.transposed
    starts, stops = readers.ranges[..., 0], readers.ranges[..., 1]
    some = stops > starts
    blocks = np.append(readers.blocks, -1)  # not even a pattern that reads nothing leaves it empty
    found = np.where(some, blocks[np.where(some, stops - 1, -1)], -1).max(-1, initial=-1)
    groups = schedule.head_index.reshape(schedule.num_kv_heads, -1)
    return found[groups].max(1).astype(np.int32)


def _slots(last: np.ndarray) -> np.ndarray:
    """Slots of blocks, each kept from its own row to its last: int32 [blocks], -1 for those that never are."""
    slot_of, free, taken, count = np.full(len(last), -1, np.int32), [], [], 0
    for block in np.flatnonzero(last >= 0).tolist():
        while taken and taken[0][0] < block:
            heapq.heappush(free, heapq.heappop(taken)[1])
        if free:
            slot = heapq.heappop(free)
        else:
            slot, count = count, count + 1
        slot_of[block] = slot
        heapq.heappush(taken, (int(last[block]), slot))
    return slot_of


def _recurrence(pattern: Pattern, heads: HeadGroups, size: int) -> tuple[int, int]:
    """The reach of a row in blocks, itself included, and the period in rows after which reads repeat."""
    blocks = TRIAL_BLOCKS
    while True:
        bands = [_bands(pattern, heads, head, size, blocks) for head in range(heads.num_heads)]
        reach = max((_reach(band, size) for each in bands for band in each), default=1)
        if reach >= UNBOUNDED // size:
            raise _unbounded(pattern)
        if 4 * reach <= blocks:
            break
        blocks = 4 * reach
    for period in range(1, blocks // 2):
        if all(_repeats(band, period) for each in bands for band in each):
            break
    else:
        raise _unbounded(pattern)
    # The first blocks may be more than were tried.
    check_agreement(pattern, heads, (MANY_BLOCKS - 2) * size, MANY_BLOCKS * size, MANY_BLOCKS * size)
    for head in range(heads.num_heads):
        if not all(_repeats(band, period) for band in _bands(pattern, heads, head, size, max(blocks, MANY_BLOCKS))):
            raise _unbounded(pattern)
    return reach, period


def _bands(pattern: Pattern, heads: HeadGroups, head: int, size: int, blocks: int) -> tuple[Band, ...]:
    bands = pattern.bands(heads, head, size, blocks, blocks)
    if bands is None:
        raise _unbounded(pattern)
    return bands


def _unbounded(pattern: Pattern) -> ValueError:
    return ValueError(
        f"a cache for {pattern!r} needs max_length, the most tokens that it shall hold: only patterns that look back a "
        "bounded distance, alike everywhere, stream without end"
    )


def _reach(band: Band, size: int) -> int:
    return max(0, min(band.block_high, -(-(band.token_high + size - 1) // size)))


def _repeats(band: Band, period: int) -> bool:
    columns = band.columns
    return period % band.period == 0 and bool((columns[:, period:] == columns[:, :-period]).all())

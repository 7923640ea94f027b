"""A pattern for each head."""

import dataclasses
from collections.abc import Sequence

from s2jax.messages import shown
from s2jax.patterns.base import Pattern
from s2jax.patterns.head_groups import HeadGroups


@dataclasses.dataclass(frozen=True, repr=False)
class PerHead(Pattern):
    """One pattern for each query head, or one for each KV head and its group.

    Attributes:
      patterns: one for each query head, or for each KV head. The stripes of a strided pattern among them depend on the
        number of its head among all heads.
    """

    patterns: Sequence[Pattern]

    def __post_init__(self):
        from s2jax.patterns.coercion import as_pattern  # makes families out of other things, and so knows of them

        given = self.patterns if isinstance(self.patterns, Sequence) and not isinstance(self.patterns, str) else ()
        if not given:
            raise ValueError(f"PerHead takes a list of patterns, one for each head; got {shown(self.patterns)}")
        try:
            patterns = tuple(as_pattern(each) for each in given)
        except ValueError as error:
            raise ValueError(f"PerHead takes a list of patterns, one for each head: {error}") from None
        object.__setattr__(self, "patterns", patterns)

    @property
    def causal(self) -> bool:
        return all(each.causal for each in self.patterns)

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in set(self.patterns))

    def own_block_size(self):
        return min((size for each in self.patterns if (size := each.own_block_size()) is not None), default=None)

    def check(self, heads, query_length, kv_length, query_offset):
        if len(self.patterns) not in (heads.num_heads, heads.num_kv_heads):
            raise ValueError(
                f"PerHead has {len(self.patterns)} patterns: expected one for each of {heads.num_heads} query heads "
                f"or {heads.num_kv_heads} KV heads"
            )
        for each in self.patterns:
            each.check(heads, query_length, kv_length, query_offset)

    def is_strided(self):
        return any(each.is_strided() for each in self.patterns)

    def _of(self, heads: HeadGroups, head: int) -> Pattern:
        return self.patterns[head if len(self.patterns) == heads.num_heads else heads.kv_head(head)]

    def head_key(self, heads, head):
        pattern = self._of(heads, head)
        return pattern, pattern.head_key(heads, head)

    def mask_fn(self, head, query_position, key_position, heads):
        return self._of(heads, head).mask_fn(head, query_position, key_position, heads)

    def bands(self, heads, head, block_size, num_rows, num_columns):
        return self._of(heads, head).bands(heads, head, block_size, num_rows, num_columns)

    def block_states(self, heads, head, block_size, rows, num_columns):
        return self._of(heads, head).block_states(heads, head, block_size, rows, num_columns)

    def token_tiles(self, heads, head, block_size, rows, columns, query_stop, kv_stop):
        mine = self._of(heads, head)
        return mine.token_tiles(heads, head, block_size, rows, columns, query_stop, kv_stop)

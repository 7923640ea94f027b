"""Counts of query and KV heads."""

import dataclasses

from s2jax.patterns.checks import check_count


@dataclasses.dataclass(frozen=True)
class HeadGroups:
    """Counts of query and KV heads; query head i reads KV head `i // group`."""

    num_heads: int
    num_kv_heads: int

    def __post_init__(self):
        check_count("num_heads", self.num_heads, at_least=1)
        check_count("num_kv_heads", self.num_kv_heads, at_least=1)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and {self.num_kv_heads}; "
                "every KV head serves a group of equally many query heads"
            )

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    def kv_head(self, head: int) -> int:
        return head // self.group

    def group_of(self, kv_head: int) -> range:
        """The query heads that read a KV head."""
        return range(kv_head * self.group, (kv_head + 1) * self.group)

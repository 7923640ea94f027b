"""What the op hands to a backend: what is known while tracing, and the arrays."""

import dataclasses
import typing

import jax
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels.schedule import BlockSchedule
from pallas_kernels.selection import BlockSelection


@dataclasses.dataclass(frozen=True)
class Problem:
    """All that is known while tracing; hashable.

    Attributes:
      schedule: what is read, or None where a selection among the operands says it.
      scale: what the logits are multiplied with.
      logits_soft_cap: the logits become cap · tanh(logits / cap); None leaves them.
      config: the backend's own tile sizes, or None for its own choice.
      same_segments: queries and keys have one array of segment ids: a query's segment holds its own key.
      platform: that is lowered for, "cpu", "cuda", "rocm" or "tpu"; None where it is not known yet.
    """

    schedule: BlockSchedule | None
    scale: float
    logits_soft_cap: float | None
    config: typing.Any
    same_segments: bool = False
    platform: str | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operands:
    """The arrays of one call, or of one shard of it; what is absent is None.

    Attributes:
      query_offset: int32 [b], positions of the first queries, if they are known at run time only.
      first_head: int32 scalar, number of the first query head among all heads; None if the call has all of them.
      selection: a traced choice of blocks, where there is no schedule.
      tables: what the backend made of the schedule for these heads.
    """

    query: Float[Array, "b t h d"]
    key: Float[Array, "b s k d"]
    value: Float[Array, "b s k e"]
    sinks: Float[Array, " h"] | None = None
    query_segment_ids: Int32[Array, "b t"] | None = None
    kv_segment_ids: Int32[Array, "b s"] | None = None
    query_offset: Int32[Array, " b"] | None = None
    first_head: Int32[Array, ""] | None = None
    selection: BlockSelection | None = None
    tables: typing.Any = None


def accumulation_dtype(dtype) -> np.dtype:
    """float32, or float64 for float64. (Not by jax's promotion of dtypes, which may be set to refuse.)"""
    return np.promote_types(dtype, np.float32)

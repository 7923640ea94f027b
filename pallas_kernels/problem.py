"""The arguments that the op passes to a backend: static options, and arrays."""

import dataclasses
import typing

import jax
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels.schedule import BlockSchedule
from pallas_kernels.selection import BlockSelection


@dataclasses.dataclass(frozen=True)
class Problem:
    """Static options of a call; hashable.

    Attributes:
      scale: the factor of the logits.
      logits_soft_cap: the logits become cap · tanh(logits / cap); None leaves them.
      config: the backend's own tile sizes; None lets the backend choose.
      same_segments: True if queries and keys share one array of segment ids, so that a query's segment holds its own
        key.
      platform: the platform that is lowered for, "cpu", "cuda", "rocm" or "tpu"; None while it is unknown.
    """

    scale: float
    logits_soft_cap: float | None
    config: typing.Any
    same_segments: bool = False
    platform: str | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operands:
    """The arrays of one call, or of one shard of it; an absent one is None.

    Attributes:
      schedule: the blocks that are read: a compiled pattern, static in the pytree, or a traced selection.
      query_offset: int32 [b], positions of the first queries, if they are known at run time only.
      first_head: int32 scalar, number of the first query head among all heads; None if the call has all of them.
      tables: the backend's tables of the schedule for these heads.
    """

    query: Float[Array, "b t h d"]
    key: Float[Array, "b s k d"]
    value: Float[Array, "b s k e"]
    schedule: BlockSchedule | BlockSelection
    sinks: Float[Array, " h"] | None = None
    query_segment_ids: Int32[Array, "b t"] | None = None
    kv_segment_ids: Int32[Array, "b s"] | None = None
    query_offset: Int32[Array, " b"] | None = None
    first_head: Int32[Array, ""] | None = None
    tables: typing.Any = None


def accumulation_dtype(dtype) -> np.dtype:
    """float32, or float64 for float64."""
    # JAX's own promotion of dtypes may be set to refuse.
    return np.promote_types(dtype, np.float32)

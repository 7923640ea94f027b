"""Host side that all Mosaic backends share: tables for both passes, unread keys, `vmap`, and XLA as a fallback."""

import abc
import dataclasses
import functools
import logging
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool

from pallas_kernels.batching import over_sequences
from pallas_kernels.nonfinite import depends_on_arrays, unread_keys, zero_unread_keys
from pallas_kernels.problem import Operands, Problem
from pallas_kernels.schedule import BlockSchedule
from pallas_kernels.sharding import Sharding
from pallas_kernels.xla import XLA, XlaBackend
from pallas_kernels.xla.block_lists import TileLists

LOG = logging.getLogger("s2jax")

MOST_FEATURES = 256


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ForwardTables:
    """Tables of the kernels that tile queries, forward and dq.

    Attributes:
      kernel: the backend's own tables.
      unread: keys that no query reads in blocks that are loaded; None if there are none.
      over_keys: XLA's tables of the pass over keys, if the unread keys depend on arrays; else None.
    """

    kernel: typing.Any
    unread: Bool[Array | np.ndarray, "k s"] | None
    over_keys: TileLists | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BackwardTables:
    """Tables of the backward pass: `queries` for dq, and the backend's own for dk and dv."""

    queries: ForwardTables
    kernel: typing.Any


class MosaicBackend(abc.ABC):
    """A backend of kernels written in Pallas Mosaic; see `backend.Backend` for the methods without underscore.

    A subclass chooses its configs, makes its tables, and calls its kernels.
    """

    name: typing.ClassVar[str]
    platform: typing.ClassVar[str]
    config_type: typing.ClassVar[type]
    dtypes: typing.ClassVar[tuple[str, ...]]

    @property
    def differentiable(self) -> XlaBackend:
        return XLA

    def unsupported_reason(self, problem: Problem, operands: Operands) -> str | None:
        query, value = operands.query, operands.value
        if not isinstance(query.shape[0], int):
            return f"needs a batch known while tracing, got {query.shape[0]}"
        if str(query.dtype) not in self.dtypes:
            return f"needs dtype {' or '.join(self.dtypes)}, got {query.dtype}"
        if max(query.shape[-1], value.shape[-1]) > MOST_FEATURES:
            return f"needs head dims of at most {MOST_FEATURES}, got {query.shape[-1]} and {value.shape[-1]}"
        return self._unsupported_blocks_reason(problem, operands)

    @abc.abstractmethod
    def unsupported_device_reason(self, device) -> str | None: ...

    @abc.abstractmethod
    def _unsupported_blocks_reason(self, problem: Problem, operands: Operands) -> str | None:
        """The reason why block sizes, heads or memory are not supported; None if they are."""

    def _unsupported_gradient_reason(self, problem: Problem, operands: Operands) -> str | None:
        """The reason why dk and dv are left to XLA; None if the kernel computes them."""
        return None

    # Tables.

    @abc.abstractmethod
    def _q_tables(self, problem: Problem, operands: Operands, schedule: BlockSchedule, *, backward: bool) -> typing.Any:
        """The kernel's tables of a schedule for query tiles, of the forward pass or of dq."""

    @abc.abstractmethod
    def _kv_tables(self, problem: Problem, operands: Operands, schedule: BlockSchedule) -> typing.Any:
        """The kernel's tables of a schedule for KV tiles."""

    @abc.abstractmethod
    def _kernel_specs(self, tables: typing.Any, sharding: Sharding) -> dict[str, PartitionSpec]:
        """The specs of those fields of the kernel's tables that are split with their heads."""

    def _over_queries(self, problem: Problem, operands: Operands, schedule: BlockSchedule, *, backward: bool):
        tables = self._q_tables(problem, operands, schedule, backward=backward)
        if depends_on_arrays(problem, operands):
            over_keys = XLA.key_tables(dataclasses.replace(problem, config=None), operands)
            return ForwardTables(tables, None, over_keys)
        return ForwardTables(tables, unread_keys(schedule), None)

    def forward_tables(self, problem: Problem, operands: Operands) -> ForwardTables | None:
        schedule = operands.schedule
        if not isinstance(schedule, BlockSchedule):
            return None
        return self._over_queries(problem, operands, schedule, backward=False)

    def backward_tables(self, problem: Problem, operands: Operands) -> typing.Any:
        """XLA's tables if it computes the gradients."""
        schedule = operands.schedule
        if not isinstance(schedule, BlockSchedule):
            return None
        reason = self._unsupported_gradient_reason(problem, operands)
        if reason is not None:
            LOG.info("%s leaves the gradients to xla: %s", self.name, reason)
            return XLA.backward_tables(dataclasses.replace(problem, config=None), operands)
        queries = self._over_queries(problem, operands, schedule, backward=True)
        return BackwardTables(queries, self._kv_tables(problem, operands, schedule))

    def table_specs(self, tables: typing.Any, sharding: Sharding) -> typing.Any:
        """Ranges are split with their heads; the lists that heads share are not split."""
        if isinstance(tables, BackwardTables):
            return BackwardTables(self.table_specs(tables.queries, sharding), self._specs(tables.kernel, sharding))
        if not isinstance(tables, ForwardTables):
            return XLA.table_specs(tables, sharding)
        unread: typing.Any = None if tables.unread is None else sharding.of(heads=0, ndim=2)
        over_keys = None if tables.over_keys is None else XLA.table_specs(tables.over_keys, sharding)
        return ForwardTables(self._specs(tables.kernel, sharding), unread, over_keys)

    def _specs(self, tables: typing.Any, sharding: Sharding) -> typing.Any:
        specs: typing.Any = jax.tree.map(lambda array: PartitionSpec(), tables)
        return dataclasses.replace(specs, **self._kernel_specs(tables, sharding))

    # Passes.

    @abc.abstractmethod
    def _run_forward(self, problem: Problem, operands: Operands) -> tuple[Array, Array]:
        """out and lse; `operands.tables` are the kernel's, None for a selection."""

    @abc.abstractmethod
    def _run_backward(
        self, problem: Problem, operands: Operands, kv_tables: typing.Any, dout: Array, lse: Array, delta: Array
    ) -> tuple[Array, Array, Array]:
        """dq, dk and dv; `operands.tables` and `kv_tables` are the kernels', None for a selection."""

    def forward(self, problem: Problem, operands: Operands) -> tuple[Array, Array]:
        run = functools.partial(self._run_forward, problem)
        return over_sequences(functools.partial(self._on_read_keys, problem, ("value",), run))(operands)

    def backward(
        self, problem: Problem, operands: Operands, dout: Array, lse: Array, delta: Array
    ) -> tuple[Array, Array, Array]:
        return over_sequences(functools.partial(self._backward, problem))(operands, dout, lse, delta)

    def _backward(self, problem: Problem, operands: Operands, dout: Array, lse: Array, delta: Array):
        tables: typing.Any = operands.tables
        if isinstance(operands.schedule, BlockSchedule):
            left_to_xla = not isinstance(tables, BackwardTables)
        else:
            left_to_xla = self._unsupported_gradient_reason(problem, operands) is not None
        if left_to_xla:
            return XLA.backward(dataclasses.replace(problem, config=None), operands, dout, lse, delta)
        over_queries, kv_tables = (None, None) if tables is None else (tables.queries, tables.kernel)

        def run(operands: Operands):
            return self._run_backward(problem, operands, kv_tables, dout, lse, delta)

        # Padding queries attend too: a NaN in keys that no real query reads would leak.
        return self._on_read_keys(problem, ("key", "value"), run, dataclasses.replace(operands, tables=over_queries))

    def _on_read_keys(self, problem: Problem, names: tuple[str, ...], run: typing.Callable, operands: Operands):
        """`run(operands)` with unread keys zeroed and the kernel's tables."""
        tables: ForwardTables | None = operands.tables
        if tables is None:
            return zero_unread_keys(problem, operands, names, None, None, run)
        unread = None if tables.unread is None else jnp.asarray(tables.unread)
        operands = dataclasses.replace(operands, tables=tables.kernel)
        return zero_unread_keys(problem, operands, names, unread, tables.over_keys, run)

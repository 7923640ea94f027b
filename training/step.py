"""The training state, its sharding, and the training step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

import models
from models.sharding import left_to_xla
from training.config import Config
from training.mesh import BATCH_SPEC, replicated
from training.optimizer import make_optimizer, warmup_cosine

Batch = Mapping[str, Array]  # training.packing.Row, stacked to [b, t]


class TrainState(NamedTuple):
    """The arrays of a checkpoint."""

    params: Any  # nested dict of float32 arrays
    opt_state: Any
    step: Int[Array, ""]  # optimizer steps done


class Metrics(NamedTuple):
    """Scalars of one step."""

    loss: Float[Array, ""]  # nats per counted target
    grad_norm: Float[Array, ""]  # before clipping
    learning_rate: Float[Array, ""]  # of the weight matrices


class Trainer:
    """The compiled functions of a run, with the shapes and shardings of their arguments.

    Args:
        config: of the run.
        mesh: from `training.mesh.make_mesh`.

    Raises:
        ValueError: the parameters do not divide over the mesh.
    """

    def __init__(self, config: Config, mesh: Mesh):
        self.config, self.mesh = config, mesh
        self.model_config = config.model.transformer()
        self.optimizer = make_optimizer(config.optimizer, config.steps)
        shapes = nnx.eval_shape(lambda: models.Transformer(self.model_config, rngs=nnx.Rngs(0)))
        self._graph, self._param_shapes = nnx.split(shapes)
        abstract = jax.eval_shape(lambda: self._initial(jax.random.key(0)))
        self.shardings = state_shardings(abstract, mesh)
        self.abstract_state = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract,
            self.shardings,
        )
        self.step = self._compiled(self._step, (self.shardings, replicated(mesh)), donate_argnums=0)
        self.token_nll = self._compiled(self._token_nll, replicated(mesh))
        self.logits = self._compiled(self._logits, replicated(mesh))
        self._finite = jax.jit(_finite, out_shardings=replicated(mesh))

    def _compiled(self, function: Callable, out_shardings: Any, **settings: Any) -> Any:
        """`jax.jit` of a function that is traced under the run's mesh, whose axes are Explicit."""

        @functools.wraps(function)
        def on_mesh(*args):
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                return function(*args)

        return jax.jit(on_mesh, out_shardings=out_shardings, **settings)

    def init(self, seed: int) -> TrainState:
        """Returns the initial state, created with its sharding; the same on every mesh."""
        # The key is an argument: XLA would try to compute the weights of a constant one while it compiles.
        key = jax.jit(jax.random.key, static_argnums=0)(seed)
        return jax.jit(self._initial, out_shardings=self.shardings)(key)

    def begin(self, params: Any) -> TrainState:
        """Returns the state of step 0 with these weights, sharded as in `shardings`, and donates them."""
        return jax.jit(self._unmoved, donate_argnums=0, out_shardings=self.shardings)(params)

    def not_finite(self, state: TrainState) -> list[str]:
        """Names of the arrays of a state that hold NaN or infinite numbers; every process must ask."""
        paths = jax.tree_util.tree_flatten_with_path(state._asdict())[0]
        names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
        return [name for name, finite in zip(names, jax.device_get(self._finite(state)), strict=True) if not finite]

    def _initial(self, key: Array) -> TrainState:
        model = models.Transformer(self.model_config, rngs=nnx.Rngs(key))
        return self._unmoved(nnx.to_pure_dict(nnx.state(model)))

    def _unmoved(self, params: Any) -> TrainState:
        return TrainState(params, self.optimizer.init(params), jnp.zeros((), jnp.int32))

    def model(self, params: Any) -> models.Transformer:
        """The model with these parameters."""
        state = jax.tree.map(lambda leaf: leaf, self._param_shapes)  # a copy: replacing works in place
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(self._graph, state, copy=True)  # without a copy, NNX refuses to merge within grad

    def _logits(self, params: Any, batch: Batch) -> Float[Array, "b t v"]:
        return self.model(params)(batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"])

    def _token_nll(self, params: Any, batch: Batch) -> Float[Array, "b t"]:
        """The loss of each target in nats; 0 where the loss mask is 0."""
        logits = self._logits(params, batch)
        # The vocabulary is split over "tensor", and Optax looks targets up in it.
        nll = left_to_xla(optax.softmax_cross_entropy_with_integer_labels, BATCH_SPEC)
        with jax.named_scope("loss"):
            return nll(logits, batch["targets"]) * batch["loss_mask"]

    def _step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        loss, grads = accumulated_gradient(
            lambda params, part: self._token_nll(params, part).sum(),
            state.params,
            batch,
            self.config.optimizer.accumulate,
        )
        # Muon multiplies split matrices; how the products are split is left to XLA.
        update = left_to_xla(self._update, (self.shardings.params, self.shardings.opt_state))
        # Optax mixes dtypes, which a user's strict promotion would refuse.
        with jax.named_scope("optimizer"), jax.numpy_dtype_promotion("standard"):
            params, opt_state = update(grads, state.opt_state, state.params)
        share = warmup_cosine(self.config.optimizer, self.config.steps)(state.step)
        metrics = Metrics(loss, optax.tree.norm(grads), self.config.optimizer.matrix_rate * share)
        return TrainState(params, opt_state, state.step + 1), metrics

    def _update(self, grads: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
        updates, opt_state = self.optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state


def _finite(state: TrainState) -> Bool[Array, " leaves"]:
    """True for each array of a state, in the order of its leaves, that holds finite numbers only."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state._asdict())])


def accumulated_gradient(
    summed_loss: Callable[[Any, Batch], Float[Array, ""]], params: Any, batch: Batch, parts: int
) -> tuple[Float[Array, ""], Any]:
    """The mean loss over a batch's counted targets and its gradient, the batch taken in `parts`, one after another.

    The sum of all parts is divided by the count of the *whole* batch, so parts with few counted targets weigh little,
    and the result is the whole batch's to rounding.

    Args:
        summed_loss: the loss of a batch, summed over its counted targets.
        params: pytree to differentiate by.
        batch: arrays `[b, t]`, `loss_mask` among them.
        parts: divides `b`.
    """
    count = jnp.maximum(batch["loss_mask"].sum(), 1.0)
    value_and_grad = jax.value_and_grad(lambda params, part: summed_loss(params, part) / count)
    if parts == 1:
        return value_and_grad(params, dict(batch))

    # Part j takes rows j, j + parts, …: each device cuts its own contiguous rows, and none moves.
    split = {name: jnp.swapaxes(array.reshape(-1, parts, array.shape[1]), 0, 1) for name, array in batch.items()}

    def add_part(total, part):
        return jax.tree.map(jnp.add, total, value_and_grad(params, part)), None

    zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(add_part, zero, split)[0]


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """A `NamedSharding` for each array of a `TrainState`: the optimizer's moments lie as their parameters do.

    A leaf of the optimizer belongs to the parameter whose path its own path ends with; what belongs to none (counts,
    coefficients) is replicated.

    Raises:
        ValueError: a parameter does not divide over the mesh.
    """
    specs = models.partition_specs(state.params)
    is_spec = lambda leaf: isinstance(leaf, PartitionSpec)  # noqa: E731
    by_path = dict(jax.tree_util.tree_flatten_with_path(specs, is_leaf=is_spec)[0])
    shapes = dict(jax.tree_util.tree_flatten_with_path(state.params)[0])
    for path, spec in by_path.items():
        _check_divides(path, shapes[path].shape, spec, mesh)

    def sharding(path, leaf):
        for start in range(len(path)):
            spec = by_path.get(path[start:])
            if spec is not None and shapes[path[start:]].shape == leaf.shape:
                return NamedSharding(mesh, spec)
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding, state)


def _check_divides(path: Any, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh) -> None:
    for size, axis in zip(shape, spec, strict=False):
        if axis is not None and size % mesh.shape[axis]:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(
                f"--mesh: expected a {axis} axis that divides {name} {list(shape)}, got {mesh.shape[axis]} for {size}"
            )

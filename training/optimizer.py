"""Muon or AdamW for the weight matrices, Adam for the rest; warmup, cosine, clipping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int
from optax.contrib import MuonDimensionNumbers, muon

from training.config import Config, OptimizerOptions

ADAM_B1, ADAM_B2 = 0.9, 0.95  # as usual for language models: the second moment forgets within some dozens of steps
MUON_BETA = 0.95


def warmup_cosine(options: OptimizerOptions, steps: int) -> Callable[[Int[Array, ""] | int], Float[Array, ""]]:
    """The share of the peak rate at a step: up linearly, to 1 at the last warmup step, then down along a cosine.

    The first step's rate is not zero. The warmup takes half of the steps at most, so that a short trial trains too.
    """
    warmup = min(options.warmup_steps, steps // 2)

    def share(step):
        # float32 under x64 too, where an integer over another one would be float64.
        done, since = (jnp.asarray(step + 1 - start, jnp.float32) for start in (0, warmup))
        rise = jnp.minimum(done / max(warmup, 1), 1.0)
        progress = jnp.clip(since / max(steps - warmup, 1), 0.0, 1.0)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return rise * (options.final_fraction + (1 - options.final_fraction) * cosine)

    return share


def schedule_change(before: Config, now: Config, step: int) -> str | None:
    """A line on how the rates go on after `step`, if a run that goes on has another schedule than it had."""
    old, new = (warmup_cosine(config.optimizer, config.steps) for config in (before, now))
    here, expected, then = float(old(step - 1)), float(old(min(step, before.steps - 1))), float(new(step))
    if abs(then - expected) <= 0.01 * max(then, expected):
        return None
    changed = f"--steps {now.steps} instead of {before.steps}" if now.steps != before.steps else "Another schedule"
    return (
        f"{changed}: warmup and cosine are drawn over the whole run, so the rates go on at {then:.1%} of their peaks; "
        f"step {step} was at {here:.1%}"
    )


def matrix_axes(params: Any) -> Any:
    """The axes of the matrix that each parameter of the model is, None for a parameter that is no weight matrix.

    Kernels within layers are matrices: query, key and value `[f, h, d]` map f to h·d, the output `[h, d, f]` maps h·d
    to f. Embedding and output projection are not counted among them, as is usual under Muon: their rows belong to
    tokens, seen rarely and unequally, and an orthogonal update would step all of them alike.
    """

    def axes(path, leaf) -> MuonDimensionNumbers | None:
        names = [str(getattr(key, "key", key)) for key in path]
        if names[-1] != "kernel" or "lm_head" in names:
            return None
        if leaf.ndim == 3:
            return MuonDimensionNumbers((0, 1), 2) if names[-2] == "out" else MuonDimensionNumbers(0, (1, 2))
        return MuonDimensionNumbers(0, 1)

    return jax.tree_util.tree_map_with_path(axes, params)


def make_optimizer(options: OptimizerOptions, steps: int) -> optax.GradientTransformation:
    """The whole update rule: clip, then Muon or AdamW on matrices and Adam on the rest; only matrices decay.

    Beside Muon, Adam has Nesterov momentum too, as Muon has.
    """
    share = warmup_cosine(options, steps)

    def matrix_rate(step):
        return options.matrix_rate * share(step)

    def rest_rate(step):
        return options.rest_learning_rate * share(step)

    if options.optimizer == "muon":
        rule = muon(
            matrix_rate,
            beta=MUON_BETA,
            weight_decay=options.weight_decay,
            adam_b1=ADAM_B1,
            adam_b2=ADAM_B2,
            adam_learning_rate=rest_rate,
            muon_weight_dimension_numbers=matrix_axes,
        )
    else:
        rule = optax.partition(
            {
                "matrix": optax.adamw(matrix_rate, ADAM_B1, ADAM_B2, weight_decay=options.weight_decay),
                "rest": optax.adam(rest_rate, ADAM_B1, ADAM_B2),
            },
            lambda params: jax.tree.map(
                lambda axes: "rest" if axes is None else "matrix",
                matrix_axes(params),
                is_leaf=lambda axes: axes is None or isinstance(axes, MuonDimensionNumbers),
            ),
        )
    return optax.chain(optax.clip_by_global_norm(options.clip_norm), rule)

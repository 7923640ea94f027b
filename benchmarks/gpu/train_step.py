"""A training step of one attention block: the pattern against dense attention, with the memory of each.

RMS norm, projections, attention, projection, the residual; the mean of squares, its gradient, a step of SGD, all in
bfloat16. The rest of a model is left out, so the figures show the attention's share of a step.
"""

import dataclasses
import functools
import math
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from benchmarks.cases import Case
from benchmarks.gpu.comparison import Comparison, Executables, Rows, Session
from benchmarks.gpu.implementations import CUDNN, S2JAX, S2JAX_DENSE, Attention, Executable

NAME = "train step"
RATE = 1e-3


@dataclasses.dataclass(frozen=True)
class TrainStep(Comparison):
    """A training step of a block that is as wide as its heads together."""

    implementations: tuple = (S2JAX, S2JAX_DENSE, CUDNN)
    passes: tuple[str, ...] = (NAME,)

    def make_inputs(self) -> tuple[nnx.State, Array]:
        case = self.case
        shape = case.batch, case.tokens, case.num_heads * case.head_dim
        return nnx.state(make_block(case, jax.nn.dot_product_attention)), jax.random.normal(
            jax.random.key(0), shape, "bfloat16"
        )

    def function(self, name: str) -> Callable:
        return lambda attention: lambda inputs: step(nnx.graphdef(make_block(self.case, attention)), *inputs)

    def check(self, rows: Rows, executables: Executables, inputs: typing.Any, session: Session) -> None:
        """Checks that losses are finite, and equal for dense attentions."""

        def loss(executable: Executable) -> float:
            value = float(executable.results(inputs)[0])
            if not math.isfinite(value):
                raise ValueError(f"the loss is {value}")
            return value

        for key, row in rows.items():
            if key in executables:
                session.doing(self.case.name, *key)
                row["loss"] = session.reporter.attempt(row, functools.partial(loss, executables[key]), "check failed")
        own, peer = (rows.get((each.name, NAME), {}).get("loss") for each in (S2JAX_DENSE, CUDNN))
        if own is not None and peer is not None:
            rows[S2JAX_DENSE.name, NAME]["correct"] = abs(own - peer) <= 2**-7 * abs(peer)


def make_block(case: Case, attention: Attention, dtype: str = "bfloat16") -> nnx.Module:
    """RMS norm and multi-head attention with random weights, the same for every attention."""
    width, rngs = case.num_heads * case.head_dim, nnx.Rngs(1)
    return nnx.Sequential(
        nnx.RMSNorm(width, dtype=dtype, param_dtype=dtype, rngs=rngs),
        nnx.MultiHeadAttention(
            case.num_heads, width, dtype=dtype, param_dtype=dtype, use_bias=False, decode=False, rngs=rngs,
            attention_fn=lambda query, key, value, **options: attention(query, key, value),
        ),
    )  # fmt: skip


def step(block: nnx.GraphDef, weights: nnx.State, x: Float[Array, "b t f"]) -> tuple[Array, nnx.State]:
    """The mean of squares of the block's output and the weights after one step."""

    def loss(weights):
        return jnp.square((x + nnx.merge(block, weights, copy=True)(x)).astype(jnp.float32)).mean()

    value, gradients = jax.value_and_grad(loss)(weights)
    return value, jax.tree.map(lambda weight, gradient: weight - RATE * gradient, weights, gradients)

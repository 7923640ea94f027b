"""Implementations of attention, compiled for a case.

An implementation computes the case's pattern, or dense causal attention as the baseline of speedups.
"""

import dataclasses
import functools
import time
import typing
from collections.abc import Callable

import jax
from jaxtyping import Array, Float

import s2jax
from benchmarks.cases import Case
from benchmarks.gpu.clock import Call, Wait
from s2jax.patterns import Pattern

PASSES = ("forward", "forward + backward")
RESULTS = ("out", "dquery", "dkey", "dvalue")
"""Results of the passes: the first one, or all."""

Attention = Callable[[Array, Array, Array], Array]
"""Query, key and value to out; [b, t, h, d] [b, s, k, d] [b, s, k, e] -> [b, t, h, e]."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Arrays:
    """The inputs of a case and the cotangent of its output, compared and hashed by identity."""

    query: Float[Array, "b t h d"]
    key: Float[Array, "b s k d"]
    value: Float[Array, "b s k e"]
    dout: Float[Array, "b t h e"]


def make_arrays(case: Case, dtype: str = "bfloat16", seed: int = 0) -> Arrays:
    """Random inputs of a case."""
    queries = (case.batch, case.tokens, case.num_heads, case.head_dim)
    kv = (case.batch, case.tokens, case.num_kv_heads, case.head_dim)
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = queries, kv, kv, queries
    return Arrays(*(jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)))


def forward(attention: Attention) -> Callable[[Arrays], tuple]:
    return lambda arrays: (attention(arrays.query, arrays.key, arrays.value),)


def forward_backward(attention: Attention) -> Callable[[Arrays], tuple]:
    """The output and the gradients; the output prevents that the forward pass is optimized away."""

    def both(arrays: Arrays) -> tuple:
        out, pull = jax.vjp(attention, arrays.query, arrays.key, arrays.value)
        return out, *pull(arrays.dout)

    return both


FUNCTIONS = {"forward": forward, "forward + backward": forward_backward}
"""Makers of the passes, functions of a case's inputs, from an attention."""


@dataclasses.dataclass(frozen=True)
class Executable:
    """A compiled pass.

    Attributes:
      call: the pass as it is timed.
      results: results of the same executable for other inputs, as JAX arrays.
      facts: entries of a results row.
    """

    call: Call
    results: Callable[[typing.Any], tuple[Array, ...]]
    wait: Wait = jax.block_until_ready
    facts: dict[str, typing.Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Implementation:
    """An attention written in JAX.

    Attributes:
      make: the attention of a pattern.
      dense: True if it computes dense causal attention for every pattern.
      block: tokens in a block of its pattern.
    """

    name: str
    make: Callable[[Pattern], Attention]
    dense: bool = False
    block: int = 64

    def pattern(self, case: Case) -> Pattern:
        return s2jax.Dense() if self.dense else case.pattern(self.block)

    def prepare(self, case: Case, name: str, function: Callable, inputs: typing.Any) -> Callable[[], Executable]:
        """Traces a pass, and returns a function that compiles it in any thread.

        Args:
          function: makes the pass from an attention.
        """
        lowered = jax.jit(function(self.make(self.pattern(case)))).lower(inputs)
        return functools.partial(_compile, lowered, inputs)


def _compile(lowered: jax.stages.Lowered, inputs: typing.Any) -> Executable:
    start = time.perf_counter()
    compiled = lowered.compile()
    facts: dict = {"compile s": time.perf_counter() - start}
    if (memory := compiled.memory_analysis()) is not None:
        temporary, arguments, output = (
            memory.temp_size_in_bytes, memory.argument_size_in_bytes, memory.output_size_in_bytes,
        )  # fmt: skip
        facts |= {"temporary bytes": temporary, "peak bytes": temporary + arguments + output}
    return Executable(functools.partial(compiled, inputs), compiled, facts=facts)


def s2jax_attention(implementation: str, pattern: Pattern, config: s2jax.HopperConfig | None = None) -> Attention:
    return functools.partial(s2jax.attention, pattern=pattern, implementation=implementation, config=config)


def _cudnn(pattern: Pattern) -> Attention:
    return functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")


def _tokamax(pattern: Pattern) -> Attention:
    import tokamax

    return functools.partial(tokamax.dot_product_attention, is_causal=True, implementation="mosaic_gpu")


HOPPER = functools.partial(s2jax_attention, "mosaic_gpu")
S2JAX = Implementation("s2jax", HOPPER)
S2JAX_DENSE = Implementation("s2jax dense", HOPPER, dense=True)
CUDNN = Implementation("cudnn", _cudnn, dense=True)
IMPLEMENTATIONS = (
    S2JAX,
    CUDNN,
    Implementation("tokamax", _tokamax, dense=True),
    Implementation("s2jax block 32", HOPPER, block=32),
    Implementation("s2jax block 16", HOPPER, block=16),
    Implementation("xla", functools.partial(s2jax_attention, "xla")),
)
"""Implementations in JAX; those in PyTorch are in `benchmarks.gpu.flex`."""

"""Who is compared: each side's attention, compiled for a case and ready to be called.

A side computes the case's pattern, or dense causal attention, which is what the speedups are over.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import time
import typing
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
from jaxtyping import Array, Float

import s2jax
from benchmarks.cases import Case
from benchmarks.gpu.attempt import LeftOut, attempt
from benchmarks.gpu.device_time import Call, Timing

PASSES = ("forward", "backward", "forward + backward")
GRADIENTS = ("dquery", "dkey", "dvalue")
RESULTS = {"forward": ("out",), "backward": GRADIENTS, "forward + backward": ("out", *GRADIENTS)}
"""What each pass gives."""


def lost_with(what: str) -> tuple[str, ...]:
    """Passes that are not tried where this one hangs: all, but forward alone where it is of the backward pass."""
    return PASSES[1:] if what in PASSES[1:] else PASSES


Attention = Callable[[Array, Array, Array], Array]
"""Query, key and value to out; [b, t, h, d] [b, s, k, d] [b, s, k, e] -> [b, t, h, e]."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arrays:
    """The inputs of a case, and the cotangent of its output."""

    query: Float[Array, "b t h d"]
    key: Float[Array, "b s k d"]
    value: Float[Array, "b s k e"]
    dout: Float[Array, "b t h e"]


@dataclasses.dataclass(frozen=True)
class Side:
    """One of those compared.

    Attributes:
      dense: computes dense causal attention whatever the pattern.
      block: tokens in a block of its pattern.
      make: the attention at a case; raises LeftOut.
    """

    name: str
    make: Callable[[Case, int], Attention]
    dense: bool = False
    block: int = 64

    @property
    def computes(self) -> str:
        return "dense" if self.dense else "pattern"


@dataclasses.dataclass
class Prepared:
    """A side compiled for a case.

    Attributes:
      calls: of the passes that can run, as they are timed.
      results: what the same executables give as JAX arrays [b, t, h, d], named as `RESULTS` says, given dout.
      wait: for what the calls return.
      left_out: why a pass cannot run.
      seconds: by what was made ready, the compiled passes among them.
    """

    calls: dict[str, Call]
    results: dict[str, Callable[[Array], tuple[Array, ...]]]
    wait: Callable[[typing.Any], typing.Any] = jax.block_until_ready
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    def timing(self, name: str, before: Callable[[], None] = lambda: None) -> Timing:
        """Of a pass; `before` each sample."""
        if name in self.left_out:
            return Timing(lambda: None, self.wait, failed=self.left_out[name])
        return Timing(self.calls[name], self.wait, before)


def make_arrays(case: Case, dtype: str = "bfloat16", seed: int = 0) -> Arrays:
    """Random inputs of a case."""
    keys = jax.random.split(jax.random.key(seed), 4)
    queries = (case.batch, case.tokens, case.num_heads, case.head_dim)
    kv = (case.batch, case.tokens, case.num_kv_heads, case.head_dim)
    shapes = queries, kv, kv, queries
    return Arrays(*(jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)))


def _ours(implementation: str, case: Case, block: int) -> Attention:
    pattern = case.pattern(block)

    def attention(query, key, value):
        return s2jax.attention(query, key, value, pattern, implementation=implementation)

    return attention


def _cudnn(case: Case, block: int) -> Attention:
    def attention(query, key, value):
        return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation="cudnn")

    return attention


def _tokamax(case: Case, block: int) -> Attention:
    if importlib.util.find_spec("tokamax") is None:
        raise LeftOut("tokamax is not installed")
    import tokamax

    def attention(query, key, value):
        return tokamax.dot_product_attention(query, key, value, is_causal=True, implementation="mosaic_gpu")

    return attention


SIDES = (
    Side("s2jax", functools.partial(_ours, "mosaic_gpu")),
    Side("cudnn", _cudnn, dense=True),
    Side("tokamax", _tokamax, dense=True),
    Side("s2jax block 32", functools.partial(_ours, "mosaic_gpu"), block=32),
    Side("s2jax block 16", functools.partial(_ours, "mosaic_gpu"), block=16),
    Side("xla", functools.partial(_ours, "xla")),
)
"""Those that run in JAX; PyTorch's are in `gpu.flex`."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What is not worth waiting for.

    Attributes:
      seconds: of one call of XLA's passes, as estimated.
      slow_rate: operations a second that these are taken to reach.
      free_bytes: memory that temporaries may take; None for any.
    """

    seconds: float = 2.0
    slow_rate: float = 5e12
    free_bytes: int | None = None


def not_worth(side: Side, operations: float, limits: Limits) -> dict[str, str]:
    """Passes that are left out, and why.

    Args:
      operations: of the forward pass; a backward pass takes 2.5 times as many.
    """
    found = {}
    for name in PASSES if side.name == "xla" else ():
        seconds = operations * {"forward": 1.0, "backward": 2.5, "forward + backward": 3.5}[name] / limits.slow_rate
        if seconds > limits.seconds:
            found[name] = (
                f"by XLA's loops: about {seconds:.0f} s a call, estimated at {limits.slow_rate / 1e12:.0f} TFLOP/s, "
                f"above the limit of {limits.seconds:g} s"
            )
    return found


def prepare(
    side: Side,
    case: Case,
    arrays: Arrays,
    operations: float,
    limits: Limits,
    left_out: dict[str, str] | None = None,
    compiling: Callable[[str], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> Prepared:
    """Compiles a side's passes, each alone; nothing runs yet.

    Args:
      left_out: passes that are not to be tried, and why.
      compiling: entered while a pass is compiled.

    Raises:
      LeftOut: the side cannot run here at all.
    """
    start = time.perf_counter()
    left_out = not_worth(side, operations, limits) | (left_out or {})
    if len(left_out) == len(PASSES):
        raise LeftOut(left_out["forward"])
    functions = Functions(side.make(case, side.block))
    inputs = arrays.query, arrays.key, arrays.value
    lowered, seconds = {}, {}
    for name, function in functions.of(left_out).items():
        lower = functools.partial(_lowered, functions, name, function, inputs, arrays.dout)
        lowered[name], reason = attempt(lower)
        if reason is not None:
            left_out[pass_of(name)] = reason
    seconds["trace"] = time.perf_counter() - start
    compiled = {}
    with ThreadPoolExecutor() as threads:
        jobs = {
            name: threads.submit(_compiled, each, limits, compiling(pass_of(name)))
            for name, each in lowered.items()
            if each is not None
        }
        for name, job in jobs.items():
            found, reason = attempt(job.result)
            if found is None:
                left_out[pass_of(name)] = reason
            else:
                compiled[name], seconds[f"compile {name}"] = found
    return functions.prepared(compiled, inputs, arrays.dout, left_out, seconds)


def pass_of(name: str) -> str:
    """That a compiled function belongs to: what the backward pass starts from has a function of its own."""
    return "backward" if name == "residuals" else name


def _lowered(functions: "Functions", name: str, function: Callable, inputs, dout: jax.Array) -> jax.stages.Lowered:
    return jax.jit(function).lower(*functions.arguments(name, inputs, dout))


def _compiled(
    lowered: jax.stages.Lowered, limits: Limits, compiling: contextlib.AbstractContextManager
) -> tuple[jax.stages.Compiled, float]:
    start = time.perf_counter()
    with compiling:
        compiled = lowered.compile()
    memory = compiled.memory_analysis()
    if memory is not None and limits.free_bytes is not None and memory.temp_size_in_bytes > limits.free_bytes:
        raise LeftOut(
            f"needs {memory.temp_size_in_bytes / 2**30:.1f} GiB of temporaries, of {limits.free_bytes / 2**30:.1f} free"
        )
    return compiled, time.perf_counter() - start


class Functions:
    """The passes of an attention as functions of arrays alone.

    The backward pass alone starts from what the forward pass keeps. Of that, what is an input or the output is not
    given out of the computation once more, as XLA would copy it.
    """

    def __init__(self, attention: Attention):
        self.attention = attention
        self._structure: typing.Any = None
        self._given: list[int | None] = []

    def of(self, left_out: dict[str, str]) -> dict[str, Callable]:
        named = {"forward": self.attention, "forward + backward": self.both}
        found = {name: function for name, function in named.items() if name not in left_out}
        return found if "backward" in left_out else found | {"residuals": self.residuals, "backward": self.backward}

    def arguments(self, name: str, inputs: tuple, dout: Array) -> tuple:
        if name in ("forward", "residuals"):
            return inputs
        if name == "forward + backward":
            return (*inputs, dout)
        out, kept = jax.eval_shape(self.residuals, *inputs)
        return kept, *inputs, out, dout

    def both(self, query, key, value, dout):
        """The output is a result too, so that no side can leave its forward pass out."""
        out, pull = jax.vjp(self.attention, query, key, value)
        return out, pull(dout)

    def residuals(self, query, key, value):
        out, pull = jax.vjp(self.attention, query, key, value)
        leaves, self._structure = jax.tree.flatten(pull)
        places = {id(array): place for place, array in enumerate((query, key, value, out))}
        self._given = [places.get(id(leaf)) for leaf in leaves]
        return out, [leaf for leaf, place in zip(leaves, self._given, strict=True) if place is None]

    def backward(self, kept, query, key, value, out, dout):
        rest, given = iter(kept), (query, key, value, out)
        leaves = [next(rest) if place is None else given[place] for place in self._given]
        return jax.tree.unflatten(self._structure, leaves)(dout)

    def prepared(self, compiled: dict, inputs: tuple, dout: Array, left_out: dict, seconds: dict) -> Prepared:
        """Each pass by its one executable, which is checked with some cotangents and timed with others."""
        found: dict[str, Callable[[Array], tuple]] = {}
        if "forward" in compiled:
            found["forward"] = lambda dout: (compiled["forward"](*inputs),)
        if "residuals" in compiled and "backward" in compiled:
            kept = functools.cache(lambda: compiled["residuals"](*inputs))

            def backward(dout: Array) -> tuple:
                out, residuals = kept()
                return compiled["backward"](residuals, *inputs, out, dout)

            found["backward"] = backward
        if "forward + backward" in compiled:

            def both(dout: Array) -> tuple:
                out, gradients = compiled["forward + backward"](*inputs, dout)
                return out, *gradients

            found["forward + backward"] = both
        for name in PASSES:
            if name not in found:
                left_out.setdefault(name, "was not compiled")
        calls = {name: functools.partial(function, dout) for name, function in found.items()}
        return Prepared(calls, found, left_out=left_out, seconds=seconds)

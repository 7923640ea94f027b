"""`combine` under JAX's strict modes: all of them at once in the quick suite, each alone besides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s2jax import combine
from tests import strict_modes

pytestmark = [
    pytest.mark.filterwarnings("ignore::s2jax.PatternWarning"),
    pytest.mark.usefixtures("quick_compilation"),
]

ALL = list(strict_modes.MODES)
SETS = pytest.mark.parametrize(
    "modes",
    [
        pytest.param([mode for mode in ALL if mode != "x64"], id="all but x64"),
        pytest.param(ALL, id="all"),
        *(pytest.param([mode], id=mode, marks=pytest.mark.slow) for mode in ALL),
    ],
)


def run(modes: list[str], function, *arrays):
    """The function's results, finite, with the modes on from tracing to the end."""
    with strict_modes.on(*modes):
        found = jax.block_until_ready(jax.jit(function)(*arrays))
    for leaf in jax.tree.leaves(found):
        assert leaf.dtype not in (jnp.float64, jnp.int64)
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            assert np.isfinite(np.asarray(leaf, np.float32)).all()
    return found


@SETS
def test_combine(modes: list[str]):
    outs, lses = [jnp.ones((2, 5, 4, 8))] * 2, [jnp.zeros((2, 4, 5)), jnp.ones((2, 4, 5))]

    def total(outs, lses):
        out, lse = combine(outs, lses)
        return out.sum() + lse.sum()

    run(modes, jax.value_and_grad(total, (0, 1)), outs, lses)

"""The Hopper kernels compiled for sm_90a: nothing spills, everything fits, the tensor cores are used as planned."""

import pytest
from deviceless import missing
from hopper_code import CONFIGS, compiled

import s2jax
from pallas_kernels.mosaic_gpu.tiles import SHARED_BYTES, choose_tiles

QUICK = (
    "d 64", "d 256", "d 192, e 128", "block 16", "no groups", "odd length", "selection", "few keys", "all together",
)  # fmt: skip


@pytest.mark.skipif(missing("h100") is not None, reason=str(missing("h100")))
@pytest.mark.filterwarnings("ignore::s2jax.PatternWarning")
@pytest.mark.parametrize(
    "config",
    [pytest.param(each, id=each.name, marks=[] if each.name in QUICK else [pytest.mark.slow]) for each in CONFIGS],
)
def test_code(config):
    row = compiled(config)
    assert row["stack bytes"] == row["spilled bytes"] == 0
    assert row["shared KB"] * 1024 <= SHARED_BYTES
    tiles = config.tiles or choose_tiles(config.head_dim, config.value_dim, 64, config.tokens, 1)
    size = config.pattern.block_size if isinstance(config.pattern, s2jax.LocalStride) else 64
    assert row["shared KB"] * 1024 <= tiles.shared_bytes(config.head_dim, config.value_dim, size, 3)
    # q · kᵀ takes 16 features at a time, p · v 16 keys; there is a loop without masks and one with.
    products = config.head_dim // 16 + tiles.keys // 16
    assert row["HGMMA"] == [products] * (1 if config.selection else 2)

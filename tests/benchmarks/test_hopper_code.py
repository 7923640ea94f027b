"""The Hopper kernels compiled for sm_90a: nothing spills, everything fits, the tensor cores are used as planned."""

import pytest
from deviceless import missing
from hopper_code import CONFIGS, compiled

import s2jax
from pallas_kernels.mosaic_gpu.tiles import SHARED_BYTES, choose_gradient_tiles, choose_key_tiles, choose_tiles

QUICK = ("d 256",)


@pytest.mark.skipif(missing("h100") is not None, reason=str(missing("h100")))
@pytest.mark.filterwarnings("ignore::s2jax.PatternWarning")
@pytest.mark.parametrize(
    "config",
    [pytest.param(each, id=each.name, marks=[] if each.name in QUICK else [pytest.mark.slow]) for each in CONFIGS],
)
def test_code(config):
    for row in compiled(config):
        assert not any(row["spills a step"]), row
        assert row["shared KB"] * 1024 <= SHARED_BYTES
        # There is a loop without masks and one with.
        assert row["HGMMA"] == [products(config, row)] * (1 if config.selection else 2), row
        # One number a token: copies that may begin at any 16 bytes of shared memory.
        tma, bulk = row["TMA loads, bulk loads"]
        assert tma > 0
        assert (bulk > 0) == ("key" in row["kernel"] or "value" in row["kernel"] or config.segments or config.selection)
        if row["kernel"] == "attend":
            assert row["spilled bytes"] == 0 or config.name.startswith("all together, block 16")
            assert row["shared KB"] * 1024 <= tiles_of(config).shared_bytes(*sizes(config), 3)


def sizes(config) -> tuple[int, int, int]:
    size = config.pattern.block_size if isinstance(config.pattern, s2jax.LocalStride) else 64
    return config.head_dim, config.value_dim, size


def tiles_of(config):
    return config.tiles or choose_tiles(config.head_dim, config.value_dim, 64, config.tokens, 1)


def products(config, row) -> int:
    """Of a step: over features 16 at a time, over tokens so too."""
    d, e, size = sizes(config)
    over_d, over_e = d // 16, e // 16
    if row["kernel"] == "attend":
        return over_d + tiles_of(config).keys // 16
    if row["kernel"] == "query_gradient":
        return over_d + over_e + choose_gradient_tiles(d, e, size, config.tokens, 1).keys // 16
    step = choose_key_tiles(d, e, size, config.tokens).keys // 16
    return {
        "key_value_gradients": over_d + step + over_e + step,
        "key_gradients": over_d + over_e + step,
        "value_gradients": over_d + step,
    }[row["kernel"]]

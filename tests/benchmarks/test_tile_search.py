"""Configurations that are tried and kept, and the kernel that takes them from the file."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import s2jax
from benchmarks import tile_search
from benchmarks.cases import CASES, Case
from benchmarks.schedules import forward_over_ideal
from pallas_kernels import HopperConfig
from pallas_kernels.mosaic_gpu.sm90 import backend
from pallas_kernels.mosaic_gpu.sm90 import config as config_module
from pallas_kernels.mosaic_gpu.sm90.config import choose_config, default_config, tuned_configs
from pallas_kernels.mosaic_gpu.sm90.inputs import q_tables

pytestmark = pytest.mark.filterwarnings("ignore::s2jax.PatternWarning")

TINY = Case("tiny", 1, 4, 1, 64, 2, 4, 256)


@pytest.mark.parametrize(("case", "block"), tile_search.SEARCHED, ids=lambda each: getattr(each, "name", ""))
def test_all_that_fit_are_tried_and_the_default_first(case, block):
    key, heads = tile_search.key_of(case, block)
    tried = tile_search.candidates(case, block)
    assert tried[0] == default_config(*key[:3], case.tokens, key[3])
    assert len(set(tried)) == len(tried) <= 36
    assert {each.heads_per_tile for each in tried} == set(heads)
    comparison = tile_search.compare(case, block)
    assert [each.name for each in comparison.implementations] == list(map(str, tried))
    assert comparison.implementations[1].make(case.pattern(block)).keywords["config"] == tried[1]


def test_the_cases_of_the_benchmark_are_searched():
    searched = {tile_search.key_of(case, block)[0] for case, block in tile_search.SEARCHED}
    assert {tile_search.key_of(case, block)[0] for case in CASES for block in (64, 32, 16)} <= searched


def rows(case: Case, times: dict[HopperConfig, float]) -> list[dict]:
    return [
        {"case": case.name, "implementation": str(config), "correct": True, "ms": milliseconds}
        for config, milliseconds in times.items()
    ]


def test_the_fastest_is_kept_if_it_is_faster_by_more_than_noise():
    assert tile_search.key_of(TINY, 64) == ((64, 64, 64, 2), (1, 2))
    tried = tile_search.candidates(TINY, 64)
    times = dict.fromkeys(tried, 10.0)
    for fastest, expected in ((9.9, 0), (5.0, 3)):
        (row,) = tile_search.best_configs(rows(TINY, times | {tried[3]: fastest}), [(TINY, 64)])
        assert HopperConfig(**row["config"]) == tried[expected]
        assert HopperConfig(**row["default"]) == tried[0]
        assert row["over default"] == pytest.approx(0.5 if expected else 1)


def test_all_cases_of_a_kind_decide_and_must_be_measured():
    other = Case("other", 2, 4, 1, 64, 2, 4, 256)
    searched = [(TINY, 64), (other, 64)]
    default, first, second, *_ = tile_search.candidates(TINY, 64)
    here = rows(TINY, {default: 4.0, first: 1.0, second: 3.0})
    assert tile_search.best_configs(here, searched) == []
    (row,) = tile_search.best_configs(here + rows(other, {default: 4.0, first: 20.0, second: 3.0}), searched)
    assert HopperConfig(**row["config"]) == second
    # One that failed or is wrong somewhere is not taken, however fast elsewhere.
    wrong = [each | {"correct": False} for each in rows(other, {second: 1.0})]
    (row,) = tile_search.best_configs(here + rows(other, {default: 4.0}) + wrong, searched)
    assert HopperConfig(**row["config"]) == default


@pytest.fixture
def file(monkeypatch, tmp_path):
    """A file of tiles in the place of the package's own."""
    path = tmp_path / "tuned.json"
    monkeypatch.setattr(config_module, "tuned_configs", lambda: tuned_configs.__wrapped__(path))
    return path


def write(path, **more):
    row = {"head_dim": 64, "value_dim": 64, "block_size": 64, "most_heads": 2, **more}
    path.write_text(json.dumps({"rows": [row]}))


def test_tiles_of_the_file(file):
    sizes = 64, 64, 64
    usual = choose_config(*sizes, 4096, 2, (1, 2))
    assert usual == default_config(*sizes, 4096, 2)  # no file
    write(file, config={"heads_per_tile": 1, "block_kv": 64, "num_stages": 3})
    assert choose_config(*sizes, 4096, 2, (1, 2)) == HopperConfig(1, 64, 3)
    assert choose_config(*sizes, 4096, 2) == usual  # a tile can have two heads only
    assert choose_config(*sizes, 32, 2, (1, 2)) == default_config(*sizes, 32, 2)  # steps longer than the keys
    assert choose_config(*sizes, 4096, 1) == default_config(*sizes, 4096, 1)  # another configuration


def test_a_file_that_cannot_be_read_is_an_error(file):
    write(file)
    with pytest.raises(ValueError, match="tile_search"):
        choose_config(64, 64, 64, 4096, 2)


def test_the_op_takes_them(file):
    write(file, config={"heads_per_tile": 1, "block_kv": 64, "num_stages": 3})
    shape = jax.ShapeDtypeStruct((1, 256, 4, 64), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((1, 256, 1, 64), jnp.bfloat16)
    taken = []

    def spied(*arguments):
        taken.append(choose_config(*arguments))
        return taken[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "choose_config", spied)
        jax.eval_shape(lambda q, k: s2jax.attention(q, k, k, TINY.pattern(), implementation="mosaic_gpu"), shape, kv)
    assert set(taken) == {HopperConfig(1, 64, 3)}


@pytest.mark.parametrize("block", [64, 16])
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_executed_pairs_are_those_of_the_tables(block, kv_heads):
    pattern = s2jax.LocalStride(block, 128 // block, 4)
    schedule = s2jax.compile_schedule(pattern, num_heads=4, num_kv_heads=kv_heads, query_length=1024, kv_length=1024)
    heads = 1 if kv_heads == 4 else min(4, 128 // block)
    ranges = q_tables(schedule, 128 // heads, min(block, 32)).ranges[0]
    entries = (ranges[..., 1] - ranges[..., 0]).sum(-1)  # [tiles of heads, tiles]
    executed = (-(-entries * block // 128)).sum() * 128 * 128
    ideal = np.count_nonzero(pattern.token_mask(4, kv_heads, 1024, 1024))
    assert forward_over_ideal(schedule, 128) == pytest.approx(executed / ideal)

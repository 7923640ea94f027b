"""Which tiles are tried, which are kept, and that the kernel takes them from the file."""

import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import s2jax
from benchmarks import tile_search
from benchmarks.cases import CASES, Case
from benchmarks.gpu.correctness import truth
from benchmarks.gpu.device_time import Sample
from benchmarks.gpu.guard import Ending, Job, Teller
from benchmarks.gpu.sides import make_arrays
from benchmarks.schedules import forward_over_ideal
from pallas_kernels import HopperConfig, mosaic_gpu
from pallas_kernels.mosaic_gpu.sm90 import config as config_module
from pallas_kernels.mosaic_gpu.sm90.config import choose_config, default_config, tuned_configs
from pallas_kernels.mosaic_gpu.tables import schedule_tables

pytestmark = pytest.mark.filterwarnings("ignore::s2jax.PatternWarning")

QUIET = Teller(lambda message: None)
TINY = Case("tiny", 1, 4, 1, 64, 2, 4, 256)


class Clock:
    """Says that the candidates take these milliseconds, round after round."""

    name = "told"

    def __init__(self, *values: float):
        self.values, self.times = values, 0

    def measure(self, call, wait, calls) -> Sample:
        self.times += 1
        return Sample(self.values[(self.times - 1) % len(self.values)], 1.0, calls, 1)


@pytest.mark.parametrize("case", [case for case, _ in tile_search.SEARCHED], ids=lambda case: case.name)
def test_what_is_tried_fits_and_holds_the_usual(case):
    for block in (64, 32, 16):
        key, heads = tile_search.key_of(case, block)
        tried = list(tile_search.fitting(key, heads))
        assert default_config(*key[:3], case.tokens, key[3]) in tried
        assert len(tried) <= 36
        assert {each.heads_per_tile for each in tried} == set(heads)


def test_the_points_of_the_benchmark_are_searched():
    searched = {tile_search.key_of(case, block)[0] for case, blocks in tile_search.SEARCHED for block in blocks}
    assert {tile_search.key_of(case, block)[0] for case in CASES for block in (64, 32, 16)} <= searched


@pytest.mark.usefixtures("quick_compilation")
def test_the_fastest_is_kept_if_it_is_faster_by_more_than_noise(monkeypatch):
    monkeypatch.setattr(tile_search, "KEYS", (64,))
    case = dataclasses.replace(TINY, num_kv_heads=4)
    key, heads = tile_search.key_of(case, 64)
    assert (key, heads) == ((64, 64, 64, 1), (1,))
    assert tile_search.key_of(TINY, 64) == ((64, 64, 64, 2), (1, 2))
    times = [10.0] * (1 + len(list(tile_search.fitting(key, heads))))
    for fastest, expected in ((9.9, 0), (5.0, 3)):
        times[3] = fastest
        row = tile_search.search(key, [(case, 64)], Clock(*times), QUIET, implementation="reference")
        assert row["config"] == row["tried"][expected]["config"]
        assert row["usual"] == row["tried"][0]["config"]
        assert row["of usual"] == pytest.approx(0.5 if expected else 1)


@pytest.mark.usefixtures("quick_compilation")
def test_one_forgotten_block_far_down_is_seen():
    """Where thousands of keys are read, one block of them moves the output by less than the rounding of the first."""
    case = Case("dense", 1, 1, 1, 64, 0, 0, 4096)
    arrays = make_arrays(case)
    inputs = arrays.query, arrays.key, arrays.value
    right = s2jax.attention(*inputs, s2jax.Dense(), implementation="xla")
    wrong = right.at[0, 4031].set(_without_a_block(arrays, 4031))
    assert jnp.abs(right - wrong).astype(jnp.float32).max() < 2**-6
    exact = truth(s2jax.Dense(), arrays, pairs=512 * 4096)
    assert 4031 not in exact.rows
    assert tile_search.agreeing(lambda *inputs: right, inputs, exact, None)[1] is right
    with pytest.raises(ValueError, match="at positions 1023 to 4094"):
        tile_search.agreeing(lambda *inputs: wrong, inputs, exact, right)


def _without_a_block(arrays, row):
    """The output of a row of the only head, if its last 64 keys are forgotten."""
    query, key, value = (each[0, :, 0].astype(jnp.float32) for each in (arrays.query, arrays.key, arrays.value))
    read = slice(row - 63)
    weights = jax.nn.softmax(key[read] @ query[row] / 8)
    return (weights @ value[read]).astype(arrays.query.dtype)


def test_tiles_that_fail_once_are_not_tried_again(monkeypatch):
    key, _ = tile_search.key_of(TINY, 64)
    measured = []

    def measure(case, block, candidates, clock, teller, implementation):
        measured.append(len(candidates))
        for each in candidates:
            each.milliseconds[case.name] = 1.0
        candidates[-1].failed, candidates[-1].milliseconds = "wrong by 1", {}

    monkeypatch.setattr(tile_search, "measure", measure)
    row = tile_search.search(key, [(TINY, 64), (dataclasses.replace(TINY, name="other"), 64)], Clock(1.0), QUIET)
    assert measured[1] == measured[0] - 1
    assert row["tried"][-1]["failed"] == "wrong by 1"
    monkeypatch.setattr(tile_search, "measure", lambda case, block, candidates, *rest: measure(
        case, block, candidates[:1], *rest
    ))  # fmt: skip
    with pytest.raises(RuntimeError, match="at tiny: wrong by 1"):
        tile_search.search(key, [(TINY, 64)], Clock(1.0), QUIET)


def test_all_that_is_searched_is_kept(monkeypatch, tmp_path):
    """What fails is told, what there is no time for is not begun."""
    found = tile_search.Found(tmp_path, dict(list(tile_search.groups().items())[:2]))
    one, other = found.left

    def search(key, cases, clock, teller):
        if key == other:
            raise ValueError("no")
        return {"config": {}, "usual": {}, "of usual": 1.0}

    monkeypatch.setattr(tile_search, "search", search)
    monkeypatch.setattr(tile_search, "matrix_product", lambda: (None, None, 1.0))
    monkeypatch.setattr(tile_search, "choose_clock", lambda *arguments: (Clock(1.0), {}))
    teller = Teller(lambda message: found.keep(message[1]) if message[0] == "keep" else None)
    tile_search.search_all(teller, dict(found.left), time.monotonic() - 1)
    assert set(found.left) == {one, other}
    tile_search.search_all(teller, dict(found.left), time.monotonic() + 60)
    assert not found.left
    assert found.failed == [f"{other}: ValueError: no"]
    record = json.loads((tmp_path / "tuned.json").read_text())
    assert (record["clock"], len(record["rows"])) == ("told", 1)


def test_a_configuration_that_hangs_is_left_out(tmp_path, capsys):
    found = tile_search.Found(tmp_path, tile_search.groups())
    number, first = len(found.left), next(iter(found.left))
    assert found.ended(Ending("no answer for 60 s", (Job("strided", "tiles"),)))
    assert len(found.left) == number - 1
    assert first not in found.left
    assert "no answer for 60 s: strided, tiles" in found.failed[0]
    assert not found.ended(Ending("its process ended with 1", ()))


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
        patch.setattr(mosaic_gpu, "choose_config", spied)
        jax.eval_shape(lambda q, k: s2jax.attention(q, k, k, TINY.pattern(), implementation="mosaic_gpu"), shape, kv)
    assert set(taken) == {HopperConfig(1, 64, 3)}


@pytest.mark.parametrize("block", [64, 16])
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_executed_pairs_are_those_of_the_tables(block, kv_heads):
    pattern = s2jax.LocalStride(block, 128 // block, 4)
    schedule = s2jax.compile_schedule(pattern, num_heads=4, num_kv_heads=kv_heads, query_length=1024, kv_length=1024)
    heads = 1 if kv_heads == 4 else min(4, 128 // block)
    ranges = schedule_tables(schedule, 128 // heads, min(block, 32)).ranges[0]
    entries = (ranges[..., 1] - ranges[..., 0]).sum(-1)  # [tiles of heads, tiles]
    executed = (-(-entries * block // 128)).sum() * 128 * 128
    ideal = np.count_nonzero(pattern.token_mask(4, kv_heads, 1024, 1024))
    assert forward_over_ideal(schedule, 128) == pytest.approx(executed / ideal)

"""The GPU benchmark end to end on a CPU, with other implementations in the sides' places and a clock that counts."""

import json
import time

import jax
import jax._src.cudnn.fused_attention_stablehlo as cudnn
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import pytest
import report
from gpu import run
from gpu.attempt import LeftOut, NoDeviceTime
from gpu.device_time import Sample
from gpu.guard import Teller
from gpu.options import Budget, Left, Options
from gpu.record import Record
from gpu.sides import PASSES, SIDES, Functions, Limits, Side, make_arrays, not_worth, prepare
from points import DENSE_POINTS, Point

import s2jax

TINY = Point("tiny", 1, 4, 2, 16, 2, 4, 256)
DENSE = Point("flat", 1, 2, 2, 16, 0, 0, 128)

pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.filterwarnings("ignore::s2jax.PatternWarning"),
]


class Counting:
    """Runs the calls and says that each took a millisecond more than the one before; refuses the last ones."""

    name = "counting"

    def __init__(self, refused_after: int = 1000):
        self.times, self.refused_after = 0, refused_after

    def measure(self, call, wait, calls) -> Sample:
        wait(call())
        self.times += 1
        if self.times > self.refused_after:
            raise NoDeviceTime("saw no kernel")
        return Sample(float(self.times), 1.0, calls, 1)


def ours(point, block):
    return lambda q, k, v: s2jax.attention(q, k, v, point.pattern(block), implementation="reference")


def dense(point, block):
    return lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True)


def wrong(point, block):
    return lambda q, k, v: q + jnp.repeat(k * v, 2, 2)


def refuses(point, block):
    raise NotImplementedError("needs something else")


FAKES = (
    Side("s2jax", ours),
    Side("cudnn", dense, dense=True),
    Side("wrong", wrong, dense=True),
    Side("refuses", refuses, block=16),
)


def options(*points, sides=FAKES, clock=None, **more):
    names = tuple(side.name for side in sides)
    more = {"repeats": 2, "pairs": 1 << 14, "device": "cpu", "clock": clock or Counting()} | more
    return Options(points, names, all_sides=sides, try_first=False, **more)


def measured(options, left=None) -> Record:
    """All in this process."""
    found = Record(options)
    teller = Teller(lambda message: found.keep(message[1]) if message[0] == "keep" else None)
    run.measure_all(teller, options, left or Left(options.points), time.monotonic())
    return found


def test_all_in_one_run(tmp_path):
    found = measured(options(TINY, folder=tmp_path))
    rows = found.rows
    by_side = {row["side"]: row for row in rows}
    assert list(by_side) == [side.name for side in FAKES]
    mine, peer = by_side["s2jax"], by_side["cudnn"]
    assert mine["correct"]
    assert peer["correct"]
    gradients = ["dquery", "dquery elsewhere", "dkey", "dvalue"]
    checked = {name: [check["name"] for check in checks] for name, checks in mine["errors"].items()}
    assert checked == {"forward": ["out"], "backward": gradients, "forward + backward": ["out", *gradients]}
    assert (mine["checked rows"], peer["checked rows"]) == (64, 4)
    assert not by_side["wrong"]["correct"]
    assert by_side["refuses"]["left out"] == "NotImplementedError: needs something else"
    pairs = TINY.pattern().token_mask(4, 2, 256, 256).sum()
    assert mine["pairs"] == pairs
    assert mine["forward useful TFLOP/s"] == pytest.approx(4 * 16 * pairs / mine["forward ms"] / 1e9)
    every = 4 * 256 * 257 / 2
    assert peer["backward useful TFLOP/s"] == pytest.approx(10 * 16 * every / peer["backward ms"] / 1e9)
    assert mine["forward over cudnn"] == pytest.approx(peer["forward ms"] / mine["forward ms"])
    assert mine["forward of ideal"] == pytest.approx(mine["forward over cudnn"] * mine["density"])
    best = min(peer["backward ms"], by_side["wrong"]["backward ms"])
    assert mine["backward of ideal"] == pytest.approx(best / mine["backward ms"] * mine["density"])
    assert by_side["refuses"]["block"] == 16
    # Of a peer nothing is asked; what is ours is to run and to be right.
    assert found.failures() == []

    record = json.loads((tmp_path / "attention_gpu.json").read_text())
    assert record["rows"] == rows
    assert record["clock"] == "counting"
    table = report.attention_gpu(record)
    assert "| tiny |" in table
    assert "- NotImplementedError: needs something else: refuses at tiny" in table
    assert "64 rows of ours" in table
    found.keep({"rows": [by_side[name] | {"side": f"s2jax {name}"} for name in ("wrong", "refuses")]})
    assert [line.split(": ")[1] for line in found.failures()] == ["not correct", "NotImplementedError"]


def test_points_that_the_time_does_not_allow_are_said_to_be_skipped(tmp_path):
    found = measured(options(DENSE, TINY, folder=tmp_path, budget_s=1e-9))
    assert [row["side"] for row in found.rows] == ["all", "all"]
    assert found.rows[1]["not run"].startswith("time budget")
    assert found.failures() == []  # nothing is wrong
    assert len(json.loads((tmp_path / "attention_gpu.json").read_text())["rows"]) == 2


def test_a_point_is_begun_only_if_it_would_end_in_time():
    now = time.monotonic()
    assert Budget(100, now - 50, longest_s=40).skips() is None
    assert "50 s of 100 s" in Budget(100, now - 50, longest_s=60).skips()


def test_what_the_clock_does_not_see_is_timed_by_the_host_and_not_compared():
    def cheap(point, block):
        return lambda q, k, v: q * k + v

    sides = Side("s2jax", cheap), Side("cudnn", cheap, dense=True)
    # Four samples forward are seen, of the backward pass the first round of our side's.
    mine, peer = measured(options(DENSE, sides=sides, clock=Counting(refused_after=5))).rows
    assert (mine["forward clock"], peer["forward clock"]) == ("counting", "counting")
    assert mine["forward over cudnn"] > 0
    assert (mine["backward clock"], peer.get("backward clock")) == ("counting", "queued calls, host clock")
    assert peer["backward rejected"][0] == "saw no kernel"
    assert "backward over cudnn" not in mine
    assert "backward over best dense" not in mine


def test_the_dense_pattern_is_measured_at_one_block_size():
    sides = Side("s2jax", ours), Side("s2jax block 16", ours, block=16)
    found = measured(options(DENSE, sides=sides))
    assert [row["side"] for row in found.rows] == ["s2jax"]
    assert found.failures() == []


def test_the_backward_pass_alone_gives_the_same():
    arrays = make_arrays(TINY)
    prepared = prepare(Side("any", ours), TINY, arrays, 1.0, Limits())
    assert not prepared.left_out
    alone, (out, *together) = (prepared.calls[name]() for name in PASSES[1:])
    assert (prepared.calls["forward"]()[0] == out).all()
    for one, other in zip(alone, together, strict=True):
        assert jnp.abs(one.astype(jnp.float32) - other.astype(jnp.float32)).max() < 2**-6


def test_the_timed_executable_is_the_checked_one(monkeypatch):
    """Residuals that are mixed up are seen, though the passes together are right."""
    original = Functions.backward
    monkeypatch.setattr(Functions, "backward", lambda self, kept, q, k, v, out, dout: original(
        self, kept, q, v, k, out, dout
    ))  # fmt: skip
    (row,) = measured(options(TINY, sides=FAKES[:1])).rows
    assert [row[f"{name} correct"] for name in PASSES] == [True, False, True]
    assert row["correct"] is False


def test_a_pass_that_cannot_run_is_not_timed():
    left = Left((TINY,)).without("s2jax", "backward", "it hung")
    (row,) = measured(options(TINY, sides=FAKES[:1]), left).rows
    assert (row["backward failed"], row["forward + backward failed"]) == ("it hung", "it hung")
    assert "backward ms" not in row
    assert row["correct"]
    assert row["forward ms"] > 0


def test_what_is_too_slow_or_too_big_is_left_out_with_its_reason():
    (mine, xla) = (next(side for side in SIDES if side.name == name) for name in ("s2jax", "xla"))
    with pytest.raises(LeftOut, match="about 1280 s a call"):
        prepare(xla, TINY, make_arrays(TINY), 6.4e15, Limits())
    assert not_worth(mine, 6.4e15, Limits()) == {}
    left_out = prepare(Side("any", ours), TINY, make_arrays(TINY), 1.0, Limits(free_bytes=0)).left_out
    assert "GiB of temporaries" in left_out["backward"]


def test_cudnn_is_called_as_it_wants_to_be(monkeypatch):
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91300)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    side = next(side for side in SIDES if side.name == "cudnn")
    for point in (TINY, DENSE_POINTS[0]):
        attention = side.make(point, 64)
        shape = jax.ShapeDtypeStruct((1, point.tokens, point.num_heads, 64), jnp.bfloat16)
        kv = jax.ShapeDtypeStruct((1, point.tokens, point.num_kv_heads, 64), jnp.bfloat16)

        def both(query, key, value, dout, attention=attention):
            out, pull = jax.vjp(attention, query, key, value)
            return out, pull(dout)

        code = jax.jit(both).trace(shape, kv, kv, shape).lower(lowering_platforms=("cuda",)).as_text()
        assert "cudnn$fmhaSoftmax(" in code
        assert "cudnn$fmhaSoftmaxBackward(" in code
        assert "CAUSAL" in code


def test_the_hopper_kernel_as_a_side():
    point = Point("tiny", 1, 2, 1, 16, 2, 4, 128)
    arrays = make_arrays(point)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        side = Side("s2jax", SIDES[0].make)
        prepared = prepare(side, point, arrays, 1.0, Limits())
        (out,) = jax.block_until_ready(prepared.calls["forward"]())
    expected = ours(point, 64)(arrays.query, arrays.key, arrays.value)
    assert jnp.abs(out.astype(jnp.float32) - expected.astype(jnp.float32)).max() < 2**-6
    assert not prepared.left_out

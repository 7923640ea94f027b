"""The GPU benchmark end to end on a CPU, with other implementations in the sides' places and a clock that counts."""

import functools
import json
import pickle
import time

import jax
import jax._src.cudnn.fused_attention_stablehlo as cudnn
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import pytest

import s2jax
from benchmarks import attention, report
from benchmarks.cases import DENSE_CASES, Case
from benchmarks.gpu import run, train_step
from benchmarks.gpu.attempt import LeftOut, NoDeviceTime
from benchmarks.gpu.device_time import Sample
from benchmarks.gpu.guard import Ending, Job, Teller
from benchmarks.gpu.options import TRAIN_STEP, Budget, Left, Options, TrainStep
from benchmarks.gpu.record import Record
from benchmarks.gpu.sides import PASSES, SIDES, Functions, Limits, Side, make_arrays, not_worth, prepare

TINY = Case("tiny", 1, 4, 2, 16, 2, 4, 256)
DENSE = Case("flat", 1, 2, 2, 16, 0, 0, 128)

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


def ours(case, block):
    return lambda q, k, v: s2jax.attention(q, k, v, case.pattern(block), implementation="reference")


def dense(case, block):
    return lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True)


def wrong(case, block):
    return lambda q, k, v: q + jnp.repeat(k * v, 2, 2)


def refuses(case, block):
    raise NotImplementedError("needs something else")


FAKES = (
    Side("s2jax", ours),
    Side("cudnn", dense, dense=True),
    Side("wrong", wrong, dense=True),
    Side("refuses", refuses, block=16),
)


def options(*cases, sides=FAKES, clock=None, **more):
    names = tuple(side.name for side in sides)
    more = {"repeats": 2, "pairs": 1 << 14, "device": "cpu", "clock": clock or Counting()} | more
    return Options(cases, names, all_sides=sides, try_first=False, **more)


def measured(options, left=None) -> Record:
    """All in this process."""
    found = Record(options)
    teller = Teller(lambda message: found.keep(message[1]) if message[0] == "keep" else None)
    run.measure_all(teller, options, left or Left(options.cases), time.monotonic())
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


@pytest.mark.slow
def test_what_the_clock_does_not_see_is_timed_by_the_host_and_not_compared():
    def cheap(case, block):
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


@pytest.mark.slow
def test_the_dense_pattern_is_measured_at_one_block_size():
    sides = Side("s2jax", ours), Side("s2jax block 16", ours, block=16)
    found = measured(options(DENSE, sides=sides))
    assert [row["side"] for row in found.rows] == ["s2jax"]
    assert found.failures() == []


def hanging(case, block):
    def never(query):
        time.sleep(600)
        return query

    return lambda q, k, v: jax.pure_callback(never, jax.ShapeDtypeStruct(q.shape, q.dtype), q)


@pytest.mark.slow
def test_a_side_that_hangs_costs_no_other_its_results(tmp_path):
    sides = Side("s2jax", ours), Side("hangs", hanging, dense=True), Side("cudnn", dense, dense=True)
    found = run.run(options(DENSE, sides=sides, repeats=1, folder=tmp_path, stalled_s=4))
    by_side = {row["side"]: row for row in found.rows}
    assert by_side["hangs"]["left out"] == "no answer for 4 s: flat, hangs, forward"
    assert by_side["s2jax"]["correct"]
    assert by_side["cudnn"]["correct"]
    assert all(f"{name} over cudnn" in by_side["s2jax"] for name in PASSES)
    assert found.failures() == []
    assert json.loads((tmp_path / "attention_gpu.json").read_text())["rows"] == found.rows


def ended(found: Record, *jobs: Job, too_late: bool = False) -> Left | None:
    return run.after(Ending("no answer", jobs, too_late), Left((TINY, DENSE)), found)


def test_what_hangs_backward_is_tried_forward():
    found = Record(options(TINY, DENSE, sides=FAKES[:2]))
    found.keep({"rows": [{"case": "tiny", "side": "s2jax", "forward ms": 1.0, "correct": True}]})
    left = ended(found, Job("tiny", "s2jax", "backward"))
    assert left.cases == (TINY, DENSE)
    assert set(left.left_out["s2jax"]) == {"backward", "forward + backward"}
    mine, peer = found.rows
    assert mine["forward ms"] == 1
    assert mine["backward failed"] == "no answer: tiny, s2jax, backward"
    assert peer["forward failed"] == "not run, because no answer: tiny, s2jax, backward"
    assert len(found.failures()) == 2
    # What another process finds stands.
    found.keep({"rows": [{"case": "tiny", "side": "cudnn", "forward ms": 2.0}]})
    assert "forward failed" not in found.rows[1]
    assert "backward failed" in found.rows[1]
    # And what hangs forward is not tried again.
    assert set(ended(found, Job("tiny", "cudnn", "forward")).left_out["cudnn"]) == set(PASSES)


def test_what_is_no_sides_fault_costs_a_point():
    found = Record(options(TINY, DENSE, sides=FAKES[:1]))
    assert ended(found, Job("tiny", "", "the truth")).cases == (DENSE,)
    assert found.rows[-1] == {"case": "tiny", "side": "all", "left out": "no answer: tiny, the truth"}


def test_when_nothing_can_go_on_the_rows_say_so():
    found = Record(options(TINY, DENSE, sides=FAKES[:1]))
    assert ended(found) is None
    assert [(row["case"], row["left out"][:9]) for row in found.rows] == [("tiny", "no answer"), ("flat", "no answer")]
    assert len(found.failures()) == 2
    late = Record(options(TINY, DENSE, sides=FAKES[:1]))
    assert ended(late, Job("tiny", "s2jax", "forward"), too_late=True) is None
    assert [row["case"] for row in late.rows] == ["tiny", "flat"]
    assert late.rows[1]["not run"].startswith("no answer")


def test_small_calls_with_wrong_numbers_are_failures():
    found = Record(options())
    call = {"case": "a", "block": 64, "pass": "forward", "passed": False, "difference": 0.5}
    found.keep({"header": {"small calls": [call]}})
    assert found.failures() == ["small call a, block 64, forward: wrong by 0.5"]


def by_xla(case, block):
    return lambda q, k, v: s2jax.attention(q, k, v, case.pattern(block), implementation="xla")


@pytest.mark.slow
def test_a_training_step():
    case = TrainStep("step", 1, 2, 2, 16, 1, 4, 256)
    sides = Side("s2jax", by_xla), Side("cudnn", dense, dense=True)
    found = measured(options(case, sides=sides))
    sparse, own, peer = found.rows
    assert [row["side"] for row in found.rows] == ["s2jax", "s2jax dense", "cudnn"]
    assert own["correct"]
    assert sparse["loss"] != own["loss"]
    assert sparse["train step over cudnn"] == pytest.approx(peer["train step ms"] / sparse["train step ms"])
    assert sparse["train step over s2jax dense"] > 0
    assert sparse["peak bytes"] > sparse["argument bytes"] > 4 * 32 * 32 * 2
    assert found.failures() == []
    table = report.attention_gpu(found.header | {"rows": found.rows, "date": "today", "jax": "0"})
    assert "| step | s2jax dense |" in table
    left = Left((case,)).without("cudnn train step", "train step", "it hung")
    assert measured(options(case, sides=sides), left).rows[2]["left out"] == "it hung"


@pytest.mark.slow
def test_a_training_step_moves_the_weights_downhill():
    case = TrainStep("step", 1, 2, 2, 16, 1, 4, 256)
    weights = train_step.make_weights(case, "float32")
    x = jax.random.normal(jax.random.key(0), (1, 256, 32))
    taken = jax.jit(functools.partial(train_step.step, by_xla(case, 64)))
    before, after = taken(weights, x)
    assert {name: array.shape for name, array in after.items()} == {
        name: array.shape for name, array in weights.items()
    }
    assert taken(after, x)[0] < before


def test_all_points_or_some(capsys):
    asked = attention.arguments(cpu=False)
    assert asked.parse_args(["--all"]).cases is None
    with pytest.raises(SystemExit):
        asked.parse_args(["--all", "--cases", "phi3-8k"])
    assert "--cases: not allowed with argument --all" in capsys.readouterr().err


def test_all_fits_before_everything_ends():
    asked = Options()
    assert asked.budget_s < asked.limit_s <= 465
    assert TRAIN_STEP in asked.cases


def test_what_is_sent_to_the_process_can_be():
    sent = pickle.loads(pickle.dumps(Options()))
    assert [side.name for side in sent.all_sides] == [side.name for side in SIDES]
    assert sent.cases == Options().cases


def test_the_backward_pass_alone_gives_the_same():
    arrays = make_arrays(TINY)
    prepared = prepare(Side("any", ours), TINY, arrays, 1.0, Limits())
    assert not prepared.left_out
    alone, (out, *together) = (prepared.calls[name]() for name in PASSES[1:])
    assert (prepared.calls["forward"]()[0] == out).all()
    for one, other in zip(alone, together, strict=True):
        assert jnp.abs(one.astype(jnp.float32) - other.astype(jnp.float32)).max() < 2**-6


@pytest.mark.slow
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
    for case in (TINY, DENSE_CASES[0]):
        attention = side.make(case, 64)
        shape = jax.ShapeDtypeStruct((1, case.tokens, case.num_heads, 64), jnp.bfloat16)
        kv = jax.ShapeDtypeStruct((1, case.tokens, case.num_kv_heads, 64), jnp.bfloat16)

        def both(query, key, value, dout, attention=attention):
            out, pull = jax.vjp(attention, query, key, value)
            return out, pull(dout)

        code = jax.jit(both).trace(shape, kv, kv, shape).lower(lowering_platforms=("cuda",)).as_text()
        assert "cudnn$fmhaSoftmax(" in code
        assert "cudnn$fmhaSoftmaxBackward(" in code
        assert "CAUSAL" in code


@pytest.mark.slow
def test_the_hopper_kernel_as_a_side():
    case = Case("tiny", 1, 2, 1, 16, 2, 4, 128)
    arrays = make_arrays(case)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        side = Side("s2jax", SIDES[0].make)
        prepared = prepare(side, case, arrays, 1.0, Limits())
        (out,) = jax.block_until_ready(prepared.calls["forward"]())
    expected = ours(case, 64)(arrays.query, arrays.key, arrays.value)
    assert jnp.abs(out.astype(jnp.float32) - expected.astype(jnp.float32)).max() < 2**-6
    assert not prepared.left_out

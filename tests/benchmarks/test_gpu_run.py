"""The GPU benchmark end to end on a CPU, with other implementations in the peers' places and a clock that counts."""

import functools
import json
import pickle
import time

import jax
import jax._src.cudnn.fused_attention_stablehlo as cudnn
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import pytest
from flax import nnx

import s2jax
from benchmarks import attention, record, report
from benchmarks.cases import DENSE_CASES, Case
from benchmarks.gpu import run, suite, train_step
from benchmarks.gpu.clock import Sample
from benchmarks.gpu.comparison import Comparison, Options, Session, measure
from benchmarks.gpu.errors import NoDeviceTime
from benchmarks.gpu.implementations import CUDNN, PASSES, S2JAX, Implementation, forward_backward, make_arrays
from benchmarks.gpu.run import Record
from benchmarks.gpu.train_step import TrainStep
from benchmarks.gpu.watchdog import Ending, Job, Reporter

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


def ours(pattern):
    return lambda q, k, v: s2jax.attention(q, k, v, pattern, implementation="reference")


def dense(pattern):
    return lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True)


def wrong(pattern):
    return lambda q, k, v: q + jnp.repeat(k * v, 2, 2)


def refuses(pattern):
    raise NotImplementedError("needs something else")


def hanging(pattern):
    def never(query):
        time.sleep(600)
        return query

    return lambda q, k, v: jax.pure_callback(never, jax.ShapeDtypeStruct(q.shape, q.dtype), q)


FAKES = (
    Implementation("s2jax", ours),
    Implementation("cudnn", dense, dense=True),
    Implementation("wrong", wrong, dense=True),
    Implementation("refuses", refuses, block=16),
)


def options(**more) -> Options:
    return Options(**{"repeats": 2, "pairs": 1 << 14, "clock": Counting()} | more)


def recording(folder=None) -> Record:
    def write(rows, header):
        if folder:
            record.save("attention_gpu", rows, folder, **header)

    return Record(write)


def measured(*comparisons, left_out=None, found=None, **more) -> Record:
    """All in this process."""
    found = found or recording()
    reporter = Reporter(lambda message: found.keep(**message[1]) if message[0] == "keep" else None)
    run.measure_all(reporter, comparisons, options(**more), left_out or {}, time.monotonic() + 600)
    return found


def by_pass(found: Record) -> dict[tuple[str, str], dict]:
    return {(row["implementation"], row["pass"]): row for row in found.rows}


def test_all_in_one_run(tmp_path):
    found = measured(Comparison(TINY, FAKES), found=recording(tmp_path))
    rows = by_pass(found)
    assert set(rows) == {(each.name, step) for each in FAKES for step in PASSES} | {
        (name, "backward") for name in ("s2jax", "cudnn", "wrong")
    }
    (mine, mine_both), (peer, peer_both) = ([rows[name, step] for step in PASSES] for name in ("s2jax", "cudnn"))
    assert all(row["correct"] for row in (mine, mine_both, peer, peer_both))
    assert [check["name"] for check in mine_both["errors"]] == [
        "out", "out", "dquery", "dquery outside", "dkey", "dvalue",
    ]  # fmt: skip
    assert mine["checked rows"] == 64
    assert not rows["wrong", "forward"]["correct"]
    assert rows["refuses", "forward"]["failed"] == "NotImplementedError: needs something else"
    pairs = TINY.pattern().token_mask(4, 2, 256, 256).sum()
    assert (mine["pairs"], peer["pairs"]) == (pairs, 4 * 256 * 257 / 2)
    assert mine["useful TFLOP/s"] == pytest.approx(4 * 16 * pairs / mine["ms"] / 1e9)
    mine_back, peer_back, wrong_back = (rows[name, "backward"] for name in ("s2jax", "cudnn", "wrong"))
    assert peer_back["ms"] == peer_both["ms"] - peer["ms"]
    assert peer_back["useful TFLOP/s"] == pytest.approx(10 * 16 * peer["pairs"] / peer_back["ms"] / 1e9)
    assert mine["over cudnn"] == pytest.approx(peer["ms"] / mine["ms"])
    assert mine["of ideal"] == pytest.approx(mine["over cudnn"] * mine["density"])
    best = min(peer_back["ms"], wrong_back["ms"])
    assert mine_back["of ideal"] == pytest.approx(best / mine_back["ms"] * mine["density"])
    # Nothing is asked of a peer; ours must run and be right.
    assert found.failures() == []

    saved = json.loads((tmp_path / "attention_gpu.json").read_text())
    assert saved["rows"] == found.rows
    assert (saved["clock"], saved["done"]) == ("counting", ["tiny"])
    page = report.attention_gpu(saved)
    assert f"| tiny | {mine['density']:.3f} | {mine['useful TFLOP/s']:.0f} |" in page
    reason = "NotImplementedError: needs something else"
    assert f"- {reason}: refuses forward at tiny, refuses forward + backward at tiny" in page
    assert "- not correct: wrong forward at tiny, wrong forward + backward at tiny" in page
    found.keep(rows[name, "forward"] | {"implementation": f"s2jax {name}"} for name in ("wrong", "refuses"))
    assert found.failures() == [
        "s2jax wrong at tiny, forward: not correct",
        f"s2jax refuses at tiny, forward: {reason}",
    ]


def test_an_earlier_call_is_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(run.watchdog, "watch", lambda *arguments: Ending("the time was up", (), too_late=True))
    comparisons = [Comparison(DENSE, FAKES[:2]), Comparison(TINY, FAKES[:1])]
    found = measured(comparisons[0], found=recording(tmp_path))
    run.run(comparisons, options(), found)
    assert {row["not run"] for row in found.rows if row["case"] == "tiny"} == {"400 s were spent"}
    assert found.failures() == []  # nothing is wrong
    path = tmp_path / "attention_gpu.json"
    resumed = Record.resume(path, lambda rows, header: None)
    assert resumed.rows == found.rows
    assert resumed.left(comparisons) == comparisons[1:]
    measured(*resumed.left(comparisons), found=resumed)
    assert resumed.rows[:6] == found.rows[:6]
    assert not any("not run" in row for row in resumed.rows)
    assert resumed.rows[6]["ms"] > 0
    monkeypatch.setattr(run, "commit", lambda: "another")
    with pytest.raises(SystemExit, match="of another commit"):
        Record.resume(path, lambda rows, header: None)


def test_an_unseen_call_has_no_time_and_costs_no_other():
    cheap = Implementation("s2jax", ours), Implementation("other", ours)
    # Four samples of the forward pass are seen, of the other pass the first.
    rows = by_pass(measured(Comparison(DENSE, cheap), clock=Counting(refused_after=5)))
    assert rows["s2jax", PASSES[1]]["rejected"] == ["saw no kernel"]
    assert rows["s2jax", PASSES[1]]["ms"] == 5
    assert rows["other", PASSES[1]]["failed"] == "saw no kernel; saw no kernel"
    assert rows["other", "forward"]["ms"] > 0


@pytest.mark.slow
def test_a_hanging_implementation_costs_no_other_its_results(tmp_path):
    fakes = Implementation("s2jax", ours), Implementation("hangs", hanging, dense=True), FAKES[1]
    found = recording(tmp_path)
    run.run([Comparison(DENSE, fakes)], options(repeats=1, hanging_s=4), found)
    rows = by_pass(found)
    assert {rows["hangs", step]["failed"] for step in PASSES} == {"no answer for 4 s: flat, hangs, forward"}
    assert all(rows[name, step]["correct"] for name in ("s2jax", "cudnn") for step in PASSES)
    assert rows["s2jax", "backward"]["over cudnn"] > 0
    assert found.failures() == []
    assert json.loads((tmp_path / "attention_gpu.json").read_text())["rows"] == found.rows


def after(monkeypatch, *endings: Ending) -> tuple[Record, list]:
    """A run of two cases whose processes end so; and the cases and the passes left out that each was given."""
    given, comings = [], iter(endings)

    def watch(work, arguments, keep, deadline):
        given.append(([each.case.name for each in arguments[0]], dict(arguments[2])))
        return next(comings, None)

    monkeypatch.setattr(run.watchdog, "watch", watch)
    found = recording()
    run.run([Comparison(TINY, FAKES[:2]), Comparison(DENSE, FAKES[:1])], options(), found)
    return found, given


def test_a_pass_that_hangs_is_not_tried_again(monkeypatch):
    reason = "no answer: tiny, s2jax, forward + backward"
    _, given = after(monkeypatch, Ending("no answer", (Job("tiny", "s2jax", PASSES[1]),)))
    assert given == [(["tiny", "flat"], {}), (["tiny", "flat"], {("s2jax", PASSES[1]): reason})]
    _, given = after(monkeypatch, Ending("no answer", (Job("tiny", "cudnn", "forward"),)))
    assert set(given[1][1]) == {("cudnn", step) for step in PASSES}
    _, given = after(monkeypatch, Ending("no answer", (Job("step", "cudnn", "train step"),)))
    assert set(given[1][1]) == {("cudnn", "train step")}
    forward, both = measured(Comparison(TINY, FAKES[:1]), left_out={("s2jax", PASSES[1]): reason}).rows
    assert both["failed"] == reason
    assert "ms" not in both
    assert forward["correct"]
    assert forward["ms"] > 0


def test_a_case_that_no_implementation_is_to_blame_for_is_not_tried_again(monkeypatch):
    found, given = after(monkeypatch, Ending("no answer", (Job("tiny", "", "the truth"),)))
    assert [cases for cases, _ in given] == [["tiny", "flat"], ["flat"]]
    assert found.rows[0]["failed"] == "no answer: tiny, the truth"
    assert len(found.failures()) == 2


def test_without_a_process_that_begins_the_rows_say_so(monkeypatch):
    found, given = after(monkeypatch, Ending("its process ended with 1", ()))
    assert len(given) == 1
    assert {row["failed"] for row in found.rows} == {"its process ended with 1: nothing was begun"}
    assert len(found.failures()) == 4


def test_out_of_time_the_rows_say_so(monkeypatch):
    found, given = after(monkeypatch, Ending("the time was up", (Job("tiny", "s2jax", "forward"),), too_late=True))
    assert len(given) == 1
    assert {row["not run"] for row in found.rows} == {"400 s were spent"}
    assert found.failures() == []


def test_after_the_budget_one_round_is_enough_and_no_case_begins():
    found = recording()
    reporter = Reporter(lambda message: found.keep(**message[1]) if message[0] == "keep" else None)
    measure(Comparison(DENSE, FAKES[:1]), Session(options(repeats=3), reporter, Counting(), {}, stop=0.0))
    assert [len(row["calls"]) for row in found.rows if row["pass"] in PASSES] == [1, 1]
    run.measure_all(reporter, [Comparison(TINY, FAKES[:1])], options(), {}, stop=0.0)
    assert {row["case"] for row in found.rows} == {"flat"}


def test_a_second_process_replaces_failures_and_keeps_times():
    found, row = recording(), {"case": "tiny", "implementation": "s2jax", "dense": True, "head_dim": 1, "pairs": 1}
    one, other = row | {"pass": "forward"}, row | {"pass": "train step"}
    found.keep([one | {"ms": 1.0}, other | {"failed": "hung"}])
    found.keep([one, other | {"ms": 2.0}])
    assert [row.get("ms") for row in found.rows] == [1.0, 2.0]
    assert not any("failed" in row for row in found.rows)


def by_xla(pattern):
    return lambda q, k, v: s2jax.attention(q, k, v, pattern, implementation="xla")


STEP = Case("step", 1, 2, 2, 16, 1, 4, 256)


def test_a_training_step():
    fakes = Implementation("s2jax", by_xla), Implementation("s2jax dense", dense, dense=True), FAKES[1]
    found = measured(TrainStep(STEP, fakes))
    sparse, own, peer = found.rows
    assert own["correct"]
    assert own["loss"] == peer["loss"] != sparse["loss"]
    assert sparse["over cudnn"] == pytest.approx(peer["ms"] / sparse["ms"])
    assert sparse["peak bytes"] > 4 * 32 * 32 * 2
    assert found.failures() == []
    table = report.attention_gpu(found.header | {"rows": found.rows, "date": "today", "jax": "0"})
    assert "| step | s2jax dense |" in table


def test_a_training_step_moves_the_weights_downhill():
    block = train_step.make_block(STEP, by_xla(STEP.pattern()), "float32")
    graph, weights = nnx.split(block)
    x = jax.random.normal(jax.random.key(0), (1, 256, 32))
    taken = jax.jit(functools.partial(train_step.step, graph))
    before, after = taken(weights, x)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, weights)
    assert taken(after, x)[0] < before


def test_all_cases_or_some(capsys):
    asked = attention.arguments(cpu=False)
    assert asked.parse_args(["--all"]).cases is None
    with pytest.raises(SystemExit):
        asked.parse_args(["--all", "--cases", "phi3-8k"])
    assert "--cases: not allowed with argument --all" in capsys.readouterr().err


def test_the_suite():
    """Small cases come first, for our own implementations alone; the dense pattern has one block size."""
    comparisons = {case.name: suite.compare(case) for case in suite.GPU_CASES}
    names = {name: [each.name for each in comparison.implementations] for name, comparison in comparisons.items()}
    ours = ["s2jax", "s2jax block 32", "s2jax block 16"]
    assert list(names.values())[:4] == [ours, ours, ours, ["s2jax"]]
    assert names["dkernel-32k"] == [each.name for each in suite.ALL]
    assert names["dense-16k-d128"] == ["s2jax", "cudnn", "tokamax", "xla"]
    assert names["train-1.3b-32k"] == ["s2jax", "s2jax dense", "cudnn"]
    assert set(suite.NAMED) == set(names) - {case.name for case in suite.SMALL_CASES}
    sent = pickle.loads(pickle.dumps(list(comparisons.values())))
    assert [each.case for each in sent] == list(suite.GPU_CASES)


def test_everything_ends_in_time():
    assert Options().budget_s < Options().budget_s + run.GRACE_S <= 465


def both(implementation: Implementation, case: Case):
    return forward_backward(implementation.make(case.pattern()))


def test_cudnn_is_called_as_it_wants_to_be(monkeypatch):
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91300)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    for case in (TINY, DENSE_CASES[0]):
        arrays = jax.eval_shape(functools.partial(make_arrays, case))
        code = jax.jit(both(CUDNN, case)).trace(arrays).lower(lowering_platforms=("cuda",)).as_text()
        assert "cudnn$fmhaSoftmax(" in code
        assert "cudnn$fmhaSoftmaxBackward(" in code
        assert "CAUSAL" in code


@pytest.mark.slow
def test_the_hopper_kernel_as_an_implementation():
    case = Case("tiny", 1, 2, 1, 16, 2, 4, 128)
    arrays = make_arrays(case)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        found = Comparison(case, (S2JAX,))
        executable = S2JAX.prepare(case, "forward", found.function("forward"), arrays)()
        (out,) = jax.block_until_ready(executable.call())
    expected = ours(case.pattern())(arrays.query, arrays.key, arrays.value)
    assert jnp.abs(out.astype(jnp.float32) - expected.astype(jnp.float32)).max() < 2**-6

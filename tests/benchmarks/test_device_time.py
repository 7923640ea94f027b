"""The clocks, with a fake CUPTI: what cannot be believed is refused, and one side's failure is its own."""

import time

import pytest

from benchmarks.gpu import device_time
from benchmarks.gpu.attempt import LeftOut, NoDeviceTime, one_line
from benchmarks.gpu.device_time import Cupti, Queued, Sample, Timing, choose_clock, in_turn


class Reader:
    """CUPTI as jaxlib shows it: kernels (name, milliseconds) of what ran since `_cupti_init`."""

    def __init__(self, *durations: float, left_over: int = 0):
        self.durations, self.left_over, self.seen = durations, left_over, []

    def _cupti_init(self):
        self.seen = [("old", 0.001)] * self.left_over

    def _cupti_get_timings(self, finalize):
        assert not finalize
        return self.seen

    def call(self):
        time.sleep(sum(self.durations) / 1e3)
        self.seen += [("kernel", each) for each in self.durations]


def wait(result):
    return result


@pytest.fixture
def passing(monkeypatch):
    """A host's clock that only moves when told: `passing(seconds)` is a call that takes so long."""
    now = [0.0]
    monkeypatch.setattr(device_time.time, "perf_counter", lambda: now[0])

    def make(seconds: float):
        def call():
            now[0] += seconds

        return call

    return make


def test_the_kernels_of_a_call():
    reader = Reader(2.0, 1.0)
    sample = Cupti(reader).measure(reader.call, wait, 3)
    assert (sample.device_ms, sample.calls, sample.kernels) == (pytest.approx(3), 3, 2)
    assert sample.host_ms >= 3


@pytest.mark.parametrize(
    ("reader", "reason"),
    [
        (Reader(), "saw no kernel"),
        (Reader(2.0, left_over=1), "saw 4 kernels in 3 equal calls"),
        (Reader(0.0), "0.000 ms"),
    ],
)
def test_what_cannot_be_is_refused(reader, reason):
    with pytest.raises(NoDeviceTime, match=reason):
        Cupti(reader).measure(reader.call, wait, 3)


def test_more_time_than_passed_is_refused():
    reader = Reader(1000.0)
    with pytest.raises(NoDeviceTime, match="of calls that took"):
        Cupti(reader).measure(lambda: reader.seen.append(("kernel", 1000.0)), wait, 1)


def test_without_a_reader_the_next_clock_is_taken(passing):
    with pytest.raises(NoDeviceTime, match="no CUPTI reader"):
        Cupti(object())
    clock, told = choose_clock(passing(0.002), wait, 1e9, 1e15)
    assert clock.name == Queued.name
    # Where jaxlib has a reader of its own, that sees no GPU.
    assert "Error" in told["cupti"] or "NoDeviceTime" in told["cupti"]


def test_no_clock_is_taken_that_says_less_than_can_be(passing):
    with pytest.raises(NoDeviceTime, match="less than this GPU can take"):
        choose_clock(passing(0.002), wait, 1e15, 1e15)


def test_queued_calls(passing):
    sample = Queued().measure(passing(0.004), wait, 5)
    assert (sample.device_ms, sample.host_ms, sample.kernels) == (pytest.approx(4), pytest.approx(4), None)


class Fixed:
    """A clock that says what it was told to, and refuses None."""

    name = "fixed"

    def __init__(self, *values: float | None):
        self.values = list(values)

    def measure(self, call, wait, calls) -> Sample:
        value = self.values.pop(0)
        if value is None:
            raise NoDeviceTime("not this time")
        return Sample(value, 2 * value, calls, 1)


def test_sides_in_turn():
    order = []

    def fails():
        raise NotImplementedError("cannot do it\nand much more")

    timings = {
        name: Timing(call, wait)
        for name, call in (("a", lambda: order.append("a")), ("b", fails), ("c", lambda: order.append("c")))
    }
    in_turn(timings, Fixed(1.0, 10.0, None, 30.0, 3.0, 20.0), 3, burst_ms=0, pause_s=0)
    assert order == ["a"] * 2 + ["c"] * 2  # to warm up; the clock ran nothing
    row = timings["a"].row("forward")
    assert (row["forward ms"], row["forward min ms"], row["forward samples"]) == (2.0, 1.0, 2)
    assert row["forward rejected"] == ["not this time"]
    assert timings["c"].row("x")["x ms"] == 20
    assert timings["b"].row("x") == {"x failed": "NotImplementedError: cannot do it"}


def test_long_calls_are_sampled_three_times():
    timing = Timing(lambda: None, wait)
    in_turn({"a": timing}, Fixed(*[400.0] * 9), 9, burst_ms=0, pause_s=0)
    assert len(timing.samples) == 3


def test_no_round_is_begun_when_there_is_enough():
    timing = Timing(lambda: None, wait)
    in_turn({"a": timing}, Fixed(1.0, 1.0), 2, burst_ms=0, pause_s=0, enough=lambda: True)
    assert len(timing.samples) == 1


def test_what_was_raised_in_one_line():
    assert one_line(LeftOut("not here")) == "not here"
    assert one_line(ValueError("\n first\nsecond")) == "ValueError: first"

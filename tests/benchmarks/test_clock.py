"""The clocks, with a fake CUPTI: unbelievable times are refused."""

import time

import pytest

from benchmarks.gpu import clock
from benchmarks.gpu.clock import Cupti, QueuedCalls, Sample, Timing, choose_clock
from benchmarks.gpu.errors import LeftOut, NoDeviceTime, one_line


class Reader:
    """CUPTI as the CUDA plugin shows it: kernels (name, milliseconds) that ran since `_cupti_init`."""

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
    """A host's clock that only calls move: `passing(seconds)` is a call that takes so long."""
    now = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])

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
        (Reader(), "saw 0 kernels in 3 equal calls"),
        (Reader(2.0, left_over=1), "saw 4 kernels in 3 equal calls"),
        (Reader(0.0), "0.000 ms"),
    ],
)
def test_impossible_counts_are_refused(reader, reason):
    with pytest.raises(NoDeviceTime, match=reason):
        Cupti(reader).measure(reader.call, wait, 3)


def test_more_time_than_passed_is_refused():
    reader = Reader(1000.0)
    with pytest.raises(NoDeviceTime, match="for calls that took"):
        Cupti(reader).measure(lambda: reader.seen.append(("kernel", 1000.0)), wait, 1)


def test_without_a_reader_the_next_clock_is_taken(passing):
    with pytest.raises(NoDeviceTime, match="no CUPTI reader"):
        Cupti(object())
    chosen, evidence = choose_clock(passing(0.002), wait, 1e9)
    assert chosen.name == QueuedCalls.name
    assert "Error" in evidence["cupti"] or "NoDeviceTime" in evidence["cupti"]


def test_a_clock_that_says_less_than_any_gpu_takes_is_refused(passing):
    with pytest.raises(NoDeviceTime, match="a matrix product at 50000 TFLOP/s"):
        choose_clock(passing(0.002), wait, 1e14)


def test_a_clock_that_counts_calls_between_its_measurements_is_refused(monkeypatch, passing):
    kernels = iter((1, 1, 2))
    monkeypatch.setattr(QueuedCalls, "measure", lambda *arguments: Sample(1.0, 1.0, 1, next(kernels)))
    with pytest.raises(NoDeviceTime, match=r"kernels: \{1, 2\}"):
        choose_clock(passing(0.002), wait, 1e9)


def test_queued_calls(passing):
    sample = QueuedCalls().measure(passing(0.004), wait, 5)
    assert (sample.device_ms, sample.host_ms, sample.kernels) == (pytest.approx(4), pytest.approx(4), None)


def test_the_median_of_the_samples(passing):
    values = iter((1.0, None, 30.0, 3.0))

    class Fixed:
        def measure(self, call, wait, calls):
            if (value := next(values)) is None:
                raise NoDeviceTime("not this time")
            return Sample(value, 2 * value, calls, 1)

    timing = Timing(passing(0.004), wait)
    timing.warm_up()
    assert timing.calls == 7
    for _ in range(4):
        timing.sample(Fixed())
    row = timing.figures()
    assert (row["ms"], row["min ms"], row["max ms"], row["calls"]) == (3.0, 1.0, 30.0, [7] * 3)
    assert row["rejected"] == ["not this time"]
    assert Timing(passing(1), wait).figures() == {"failed": "not sampled"}


def test_slow_calls_are_left_out(passing):
    with pytest.raises(LeftOut, match=r"a call takes 3.0 s, above the limit of 2 s"):
        Timing(passing(3), wait).warm_up()


def test_errors_in_one_line():
    assert one_line(LeftOut("not here")) == "not here"
    assert one_line(ValueError("\n first\nsecond")) == "ValueError: first"

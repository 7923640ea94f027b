"""What a run measures, and what is still to be done of it."""

import dataclasses
import pathlib
import time

from benchmarks.cases import CASES, DENSE_CASES, Case
from benchmarks.gpu import correctness
from benchmarks.gpu.device_time import Clock
from benchmarks.gpu.flex import NAMES as FLEX
from benchmarks.gpu.sides import SIDES, Limits, Side, lost_with


class TrainStep(Case):
    """A training step of an attention block whose width is that of its heads together; see `gpu.train_step`."""

    @property
    def width(self) -> int:
        return self.num_heads * self.head_dim


TRAIN_STEP = TrainStep("train-1.3b-32k", 1, 16, 16, 128, 1, 16, 32 << 10)

FIRST = ("dkernel-32k", "phi3-8k", "dense-16k-d128", "s2-7b-128k", "train-1.3b-32k", "phi3-128k", "s2-1.3b-128k",
         "s2-70b-128k")  # fmt: skip
"""In this order, then the rest: what a short run should have."""

GPU_CASES = tuple(sorted(
    (*CASES, *DENSE_CASES, TRAIN_STEP),
    key=lambda case: FIRST.index(case.name) if case.name in FIRST else len(FIRST),
))  # fmt: skip
TRAIN_SIDES = ("s2jax", "s2jax dense", "cudnn")
SIDE_NAMES = (*(side.name for side in SIDES), *FLEX)


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured, and how long it may take.

    Attributes:
      budget_s: no case is begun that might end later, were it as long as the longest so far.
      folder: where the file goes; None for nowhere.
      pairs: logits held at once when our side is checked, a sixteenth of it for others; more are more rows.
      all_sides: among which `sides` chooses, besides PyTorch's.
      device: where all of it runs; anything but "cuda" is a test.
      try_first: small calls in a process of its own decide which of our block sizes are left out.
      stalled_s: a call that takes longer hangs.
      compiling_s: compiling does, where nothing else begins or ends either.
      xla_s: passes by XLA's loops are left out that are estimated to take longer.
      clock: chosen where the process runs, if None.
    """

    cases: tuple[Case, ...] = GPU_CASES
    sides: tuple[str, ...] = SIDE_NAMES
    repeats: int = 5
    budget_s: float = 400
    folder: pathlib.Path | None = None
    pairs: int = correctness.PAIRS
    all_sides: tuple[Side, ...] = SIDES
    device: str = "cuda"
    try_first: bool = True
    stalled_s: float = 60
    compiling_s: float = 150
    xla_s: float = Limits.seconds
    clock: Clock | None = None

    @property
    def limit_s(self) -> float:
        """When everything ends, done or not."""
        return self.budget_s + 60

    def block_of(self, name: str) -> int:
        return next((side.block for side in self.all_sides if side.name == name), 64)

    def sides_at(self, case: Case) -> tuple[str, ...]:
        """The dense pattern has no block size of its own: it is measured once."""
        if isinstance(case, TrainStep):
            return tuple(name for name in TRAIN_SIDES if name.removesuffix(" dense") in self.sides)
        return tuple(name for name in self.sides if not case.is_dense or self.block_of(name) == 64)


LeftOuts = dict[str, dict[str, str]]
"""For each side, its passes that are not tried, and why."""


@dataclasses.dataclass(frozen=True)
class Left:
    """What is still to be done, and what is known by now.

    Attributes:
      cases: not yet done.
      left_out: what is not tried again.
      longest_s: that a case has taken so far.
    """

    cases: tuple[Case, ...]
    left_out: LeftOuts = dataclasses.field(default_factory=dict)
    longest_s: float = 0.0

    def without(self, side: str, what: str, reason: str) -> "Left":
        """Without a side that hung: what hangs forward is not tried at all, what hangs backward is so forward alone."""
        lost = dict.fromkeys(lost_with(what), reason) | self.left_out.get(side, {})
        return dataclasses.replace(self, left_out=self.left_out | {side: lost})


class Budget:
    """The time of the run, from `start` on the clock that all processes share, and how long cases have taken."""

    def __init__(self, seconds: float, start: float, longest_s: float = 0.0):
        self._start, self._seconds, self.longest_s = start, seconds, longest_s

    @property
    def spent(self) -> float:
        return time.monotonic() - self._start

    def is_over(self) -> bool:
        return self.spent > self._seconds

    def skips(self) -> str | None:
        """Why a further case is not begun."""
        if self.spent + self.longest_s <= self._seconds:
            return None
        return (
            f"time budget: {self.spent:.0f} s of {self._seconds:g} s were spent, "
            f"and a case has taken {self.longest_s:.0f} s"
        )

    def took(self, seconds: float) -> None:
        self.longest_s = max(self.longest_s, seconds)

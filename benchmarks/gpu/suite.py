"""The comparisons of the benchmark on a GPU."""

from benchmarks.cases import CASES, DENSE_CASES, Case
from benchmarks.gpu.comparison import Comparison
from benchmarks.gpu.flex import FLEX
from benchmarks.gpu.implementations import IMPLEMENTATIONS
from benchmarks.gpu.train_step import TrainStep

SMALL_CASES = (
    Case("small", 2, 4, 4, 128, 2, 4, 1024),
    Case("small-groups", 2, 4, 1, 128, 2, 4, 1024),
    Case("small-d64", 2, 4, 4, 64, 2, 4, 1024),
    Case("small-dense", 2, 4, 4, 128, 0, 0, 1024),
)
"""Cases that run first, for our own implementations alone: hangs and wrong results appear here, in all rows."""

TRAIN_CASE = Case("train-1.3b-32k", 1, 16, 16, 128, 1, 16, 32 << 10)

ORDER = ("dkernel-32k", "phi3-8k", "dense-16k-d128", "s2-7b-128k", "train-1.3b-32k", "phi3-128k", "s2-1.3b-128k",
         "s2-70b-128k", "dkernel-32k-v4", "dense-4k-d64", "dense-4k-d128", "dense-16k-d64")  # fmt: skip
"""The most important cases first, in case time runs out."""

NAMED = {case.name: case for case in (*CASES, *DENSE_CASES, TRAIN_CASE)}
GPU_CASES = (*SMALL_CASES, *(NAMED[name] for name in ORDER))

ALL = (*IMPLEMENTATIONS, *FLEX)


def compare(case: Case, names: tuple[str, ...] = tuple(each.name for each in ALL)) -> Comparison:
    """The comparison of a case, restricted to the named implementations."""
    if case is TRAIN_CASE:
        chosen = tuple(each for each in TrainStep(case).implementations if each.name.removesuffix(" dense") in names)
        return TrainStep(case, chosen)
    chosen = tuple(each for each in ALL if each.name in names)
    if case.is_dense:  # which has no block size of its own, and FlexAttention is not compared for
        chosen = tuple(each for each in chosen if each in IMPLEMENTATIONS and each.block == 64)
    if case in SMALL_CASES:
        chosen = tuple(each for each in chosen if each.name.startswith("s2jax"))
    return Comparison(case, chosen)

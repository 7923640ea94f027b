"""One planted fault, and the tests that several of them name."""

import dataclasses

CASE = "tests/kernels/test_xla.py::TestXla::test_"
CHANGED = "tests/kernels/test_xla.py::TestTransformations::test_"


@dataclasses.dataclass(frozen=True)
class Fault:
    """`old` becomes `new` in a file, and the test fails.

    Attributes:
      unseen: why no test here can find it; the test is then one that passes all the same, and must.
    """

    name: str
    file: str
    old: str
    new: str
    test: str
    unseen: str | None = None


def case(name: str) -> str:
    return f"{CASE}case[{name}]"


def in_two_passes(name: str) -> str:
    """The backward pass that is not for CPUs."""
    return f"{CASE}two_passes[{name}]"


def interpreted(name: str) -> str:
    """The Hopper kernel in the interpreter."""
    return f"tests/kernels/test_mosaic_gpu.py::TestInterpreted::test_case[{name}]"


def hopper_shape(name: str) -> str:
    """The same in the shapes that only this kernel has."""
    return f"tests/kernels/test_mosaic_gpu.py::TestInterpreted::test_shape[{name}]"


def gradients(name: str) -> str:
    """Its gradients."""
    return f"tests/kernels/test_mosaic_gpu_gradients.py::TestGradients::test_case[{name}]"


def machine_code(name: str) -> str:
    """What the compiler for Hopper makes of a call."""
    return f"tests/benchmarks/test_ptxas_report.py::test_code[{name}]"

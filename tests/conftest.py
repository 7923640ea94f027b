"""What must stand before jax is imported, and what all tests share."""

import os
import signal

# Where the tests run in the background Ctrl-C is ignored, and would be by all that they start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Eight devices, on a CPU; and where the TPU compiler is installed, neither a lock nor a look for a TPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "0")  # programs would fill the user's
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
DEVICES = "--xla_force_host_platform_device_count"
if DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}=8".strip()

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

from tests import annotations  # noqa: E402

annotations.install()

# The same examples every time: a failure is to be seen by whoever runs the tests next. No deadlines, as compiling takes
# seconds. `-m slow` and `-m ""` look further.
SHARED = {"derandomize": True, "deadline": None, "database": None, "print_blob": False}
TOO_SLOW = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.differing_executors]
hypothesis.settings.register_profile("quick", max_examples=30, suppress_health_check=TOO_SLOW, **SHARED)
hypothesis.settings.register_profile("thorough", max_examples=300, suppress_health_check=TOO_SLOW, **SHARED)


def pytest_configure(config):
    hypothesis.settings.load_profile("quick" if "not slow" in config.option.markexpr else "thorough")


@pytest.fixture
def strict_dtypes():
    """No silent promotion between dtypes: what is float32 in a bfloat16 computation says so."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(autouse=True)
def _compiled_quickly(request):
    """`quick_compilation` for all tests but those of kernels, which ask for it, and those marked `optimised`."""
    folder = request.path.parent.name
    if folder not in ("kernels", "benchmarks") and not request.node.get_closest_marker("optimised"):
        request.getfixturevalue("quick_compilation")


@pytest.fixture
def quick_compilation():
    """XLA without its optimisations, which halves the time of tests that compile much and compute little.

    The results differ only in rounding, and every tolerance is measured under the same option. What optimisation might
    spoil (bits that repeat, the zeroing of unread rows) is tested without this.
    """
    name = "jax_disable_most_optimizations"
    before = jax.config.values[name]
    jax.config.update(name, True)
    yield
    jax.config.update(name, before)


@pytest.fixture(scope="module")
def kept_compilations(tmp_path_factory):
    """What one test of a module compiled is not compiled again for the next, as in a program's second start."""
    settings = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()

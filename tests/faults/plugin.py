"""A pytest plugin: `pytest -p tests.faults.plugin --fault NAME` runs tests with a fault planted."""

import pytest

from tests.faults.catalogue import FAULTS
from tests.faults.fault import Import

PLANTED = pytest.StashKey[Import]()


def pytest_addoption(parser):
    parser.addoption("--fault", help="the invariant that does not hold")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config):
    """Plants the fault before any conftest imports the library."""
    name = early_config.known_args_namespace.fault
    (fault,) = (each for each in FAULTS if each.invariant == name)
    early_config.stash[PLANTED] = Import(*fault.plant()).__enter__()


def pytest_sessionfinish(session):
    if not session.config.stash[PLANTED].happened:
        pytest.exit("the tests do not import what the fault changes", returncode=pytest.ExitCode.USAGE_ERROR)

"""The list of planted faults keeps up with the code; `planted_faults.py` itself plants them."""

import pytest

from tests.kernels.planted_faults import FAULTS, ROOT


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_every_fault_can_still_be_planted(fault):
    assert (ROOT / fault.file).read_text().count(fault.old) == 1

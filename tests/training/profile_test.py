"""A trace of some dispatches."""

import contextlib

import jax.numpy as jnp
import pytest

from fame_jax.errors import UserError
from fame_jax.training.profile import COUNT, FIRST, Profile


def run(profile, stage, dispatches):
    for _ in range(dispatches):
        with profile.dispatch(stage) as result:
            result.append(jnp.ones(2) + 1)


def traces(folder):
    return sorted(path.parents[3].name for path in folder.rglob('*.xplane.pb'))


def test_each_stage_has_its_trace(tmp_path):
    with contextlib.closing(Profile(str(tmp_path))) as profile:
        run(profile, 'pretrain', FIRST + COUNT)
        assert traces(tmp_path) == ['pretrain']
        run(profile, 'finetune', FIRST)  # fewer dispatches than a trace has
    assert traces(tmp_path) == ['finetune', 'pretrain']


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with contextlib.closing(Profile('')) as profile:
        run(profile, 'pretrain', FIRST + COUNT)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='profile'):
        run(Profile(str(tmp_path / 'file' / 'in')), 'pretrain', FIRST)

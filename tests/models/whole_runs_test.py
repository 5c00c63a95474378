"""Models of every row layout in whole runs: what they learn, and that a stopped run resumes."""

import json

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from run_fixtures import make_world

from fame_jax.config.model import COMMON
from fame_jax.main import main
from fame_jax.models import registry
from fame_jax.models.registry import MODELS
from fame_jax.training import step

pytestmark = pytest.mark.slow

SIZES = {'width': 16, 'num_heads': 2, 'num_blocks': 1, 'num_experts': 2, 'hidden_width': 16}
SIZES |= {'num_clusters': 4, 'contrast_anchors': 16, 'num_levels': 2, 'max_unit': 2, 'branches': 2}
WITHOUT_BACKBONE = [name for name, cls in MODELS.items() if cls.backbone is None]


def epoch_kind(cls):
    """What an interrupted epoch depends on: rows, and a call before it. Losses keep nothing."""
    return cls.row_layout, cls.before_epoch is None


def first_of_each(kind):
    """The first model of each kind, a function of the class."""
    first = {}
    for name in WITHOUT_BACKBONE:
        first.setdefault(kind(MODELS[name]), name)
    return list(first.values())


KINDS = first_of_each(lambda cls: (*epoch_kind(cls), cls.objective, cls.item_loss))


def flags(name, workdir, *more, **options):
    """The command line of a small run; each model takes the options that it has."""
    known = registry.options(MODELS[name])
    given = {key: value for key, value in (SIZES | options).items() if key in known}
    return [
        *(f'--model={name}', f'--workdir={workdir}', '--steps_per_dispatch=2'),
        *(f'--{"" if key in COMMON else "model_options="}{key}={given[key]}' for key in given),
        *('--progress=none', '--max_length=8', '--row_length=16', '--rows_per_step=4', *more),
    ]


def arrays(workdir):
    """The leaves of every stage's last checkpoint."""
    leaves = []
    for folder in sorted((workdir / 'checkpoints').iterdir()):
        (saved,) = (path for path in folder.iterdir() if path.name.isdigit())
        for item in ('params', 'optimizer', 'best'):
            leaves += jax.tree.leaves(ocp.StandardCheckpointer().restore(saved / item))
    return leaves


@pytest.mark.parametrize('name', KINDS)
def test_a_ring_is_learned(name, tmp_path):
    """All users walk round the same ring of forty items, each from another item."""
    make_world(tmp_path, [[(u + i) % 40 + 1 for i in range(14)] for u in range(40)])
    slow = name == 'bert4rec'  # it predicts a part of the positions only
    more = [f'--learning_rate={0.003 if slow else 0.01}', '--patience=999']
    more += [f'--pretrain_epochs={160 if slow else 12}']
    options = {'dropout': 0, 'item_dropout': 0, 'mask_prob': 0.3, 'contrast_weight': 0.01}
    assert main(flags(name, tmp_path, *more, **options)) == 0
    ranks = np.load(tmp_path / 'ranks.npz')
    assert np.mean(ranks['pretrain/test/masked'] == 1) >= 0.9


@pytest.mark.parametrize('name', first_of_each(epoch_kind))
def test_a_run_stopped_inside_an_epoch_ends_as_an_uninterrupted_one(name, tmp_path, monkeypatch):
    world = ['--synthetic=users=60,items=40', '--pretrain_epochs=2', '--checkpoint_seconds=1000']
    world += ['--rows_per_step=32'] if MODELS[name].row_layout == 'prefixes' else []
    assert main(flags(name, tmp_path / 'whole', *world)) == 0
    lines = (tmp_path / 'whole' / 'metrics.jsonl').read_text().splitlines()
    steps_of_an_epoch = next(json.loads(x)['step'] for x in lines if json.loads(x)['epoch'] == 1)
    call, left = step.Program.__call__, [steps_of_an_epoch + 3]

    def call_or_stop(self, state, block, key):
        left[0] -= len(block)
        if left[0] < 0:
            raise KeyboardInterrupt
        return call(self, state, block, key)

    with monkeypatch.context() as patch:
        patch.setattr(step.Program, '__call__', call_or_stop)
        stopped = flags(name, tmp_path / 'stopped', *world, '--checkpoint_seconds=0')
        assert main(stopped) == 130
    assert main(flags(name, tmp_path / 'stopped', *world)) == 0
    for one, other in zip(arrays(tmp_path / 'whole'), arrays(tmp_path / 'stopped'), strict=True):
        np.testing.assert_array_equal(one, other)

"""What every model can do, whatever its paper: learn, stay finite, resume, be scored in parts."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from train_test import make_world

from fame_jax import config as config_lib
from fame_jax import programs, stages, train
from fame_jax import run as run_lib
from fame_jax.main import main
from fame_jax.models.build import MODELS, build, build_objective, initial

# One block of width 16 over forty items.
SMALL = [
    *('--progress=none', '--width=16', '--num_heads=2', '--num_blocks=1', '--num_experts=2'),
    *('--max_length=8', '--row_length=16', '--rows_per_step=4', '--hidden_width=16'),
    *('--intents=4', '--contrast_anchors=16', '--levels=2', '--order=2'),
]
# Parameters that have no gradient: k-means moves them, a hard choice hides them, or, in a graph
# without repeated items, a softmax is over one edge alone.
IDLE = {'iclrec': ('intents',), 'miasrec': ('importance',), 'msgifsr': ('source', 'target')}
ALONE = [name for name, row in MODELS.items() if row.backbone is None]


def flags(model, workdir, *more):
    return [f'--model={model}', f'--workdir={workdir}', *SMALL, *more]


def arrays(workdir):
    """The leaves of every stage's last checkpoint."""
    found = []
    for folder in sorted((workdir / 'checkpoints').iterdir()):
        (step,) = (path for path in folder.iterdir() if path.name.isdigit())
        for item in ('params', 'optimizer', 'best'):
            found += jax.tree.leaves(ocp.StandardCheckpointer().restore(step / item))
    return found


@pytest.mark.parametrize('model', ALONE)
def test_a_tiny_world_is_learned_by_heart(model, tmp_path):
    """Everybody walks round the same ring of forty items; only where he starts differs.

    All starts are there, so that a position tells nothing of the item, and walks are longer than a
    row, so that every position is trained that will be asked.
    """
    make_world(tmp_path, [[(u + i) % 40 + 1 for i in range(14)] for u in range(40)])
    slow = model == 'bert4rec'  # at first it only guesses by the items at hand
    more = [
        f'--learning_rate={0.003 if slow else 0.01}',
        f'--pretrain_epochs={160 if slow else 12}',
    ]
    more += ['--dropout=0', '--item_dropout=0', '--cloze_rate=0.3', '--contrast_weight=0.01']
    more += ['--patience=999']
    assert main(flags(model, tmp_path, *more)) == 0
    ranks = np.load(tmp_path / 'ranks.npz')
    assert np.mean(ranks['pretrain/test/masked'] == 1) >= 0.9


@pytest.mark.parametrize('dtype', ['float32', pytest.param('bfloat16', marks=pytest.mark.slow)])
@pytest.mark.parametrize('model', MODELS)
def test_a_few_steps_are_finite_and_move_every_parameter(model, dtype, tmp_path):
    world = ['--synthetic_users=60', '--synthetic_items=40', f'--dtype={dtype}', '--eval_users=64']
    run = run_lib.open_run(config_lib.parse(flags(model, tmp_path, *world)))
    stages.prepare(run)
    module = run.module('finetune' if MODELS[model].backbone else 'pretrain')
    fresh = initial(module, jax.random.key(0))
    epoch = stages.epochs_of(run, 'pretrain')(0)
    if MODELS[model].refresh:
        fresh = MODELS[model].refresh(
            module, fresh, stages.epochs_of(run, 'pretrain')(0).batches, jax.random.key(2)
        )
    optimizer = programs.make_optimizer(1e-2, 0.999, 0.0, frozen=['intents'])
    step = programs.make_step(
        functools.partial(build_objective(model, run.config), module), optimizer
    )
    state = programs.State(jnp.int32(0), train.copy(fresh), optimizer.init(fresh))
    for batch in epoch.batches:
        state, (total, count) = step(state, batch, jax.random.key(1))
        assert np.isfinite(total) and count > 0
    for leaf in jax.tree.leaves(state.params):
        assert np.isfinite(leaf).all()
    moved = jax.tree.map(lambda old, new: bool(np.any(old != new)), fresh, state.params)
    still = [
        jax.tree_util.keystr(p) for p, m in jax.tree_util.tree_leaves_with_path(moved) if not m
    ]
    assert [name for name in still if not any(part in name for part in IDLE.get(model, ()))] == []
    ranks = run_lib.Ranker(run, module)(state.params, 'test')
    assert ranks.unmasked.min() >= 1 and ranks.unmasked.max() <= run.data.num_items


# One of each layout but the common one, which resume_test has; the others take minutes more.
RESUMED = ('bert4rec', 'duorec', 'iclrec', 'miasrec')


@pytest.mark.parametrize(
    'model',
    [name if name in RESUMED else pytest.param(name, marks=pytest.mark.slow) for name in ALONE],
)
def test_a_run_stopped_inside_an_epoch_ends_as_if_it_had_not_been(model, tmp_path, monkeypatch):
    world = ['--synthetic_users=60', '--synthetic_items=40', '--pretrain_epochs=2']
    world += [f'--compilation_cache={tmp_path / "xla"}', '--checkpoint_every=2']
    world += ['--rows_per_step=32'] if MODELS[model].layout == 'prefixes' else []
    assert main(flags(model, tmp_path / 'whole', *world)) == 0
    lines = (tmp_path / 'whole' / 'metrics.jsonl').read_text().splitlines()
    steps_of_an_epoch = next(json.loads(x)['step'] for x in lines if json.loads(x)['epoch'] == 1)
    take, left = programs.Program.__call__, [steps_of_an_epoch + 3]

    def take_or_die(self, state, block, key):
        left[0] -= len(block)
        if left[0] < 0:
            raise KeyboardInterrupt
        return take(self, state, block, key)

    with monkeypatch.context() as patch:
        patch.setattr(programs.Program, '__call__', take_or_die)
        assert main(flags(model, tmp_path / 'stopped', *world)) == 130
    assert main(flags(model, tmp_path / 'stopped', *world)) == 0
    for one, other in zip(arrays(tmp_path / 'whole'), arrays(tmp_path / 'stopped'), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize('model', MODELS)
def test_scores_of_a_slice_are_those_of_the_whole(model):
    """So the catalogue can be scored in parts."""
    config = config_lib.parse(flags(model, 'unused'))
    module = build(model, config, num_items=12)
    params = initial(module, jax.random.key(0))
    tokens_BL = np.array([[0, 0, 3, 4, 5], [7, 8, 9, 1, 2]], np.int32)
    positions_BL = np.array([[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]], np.int32)
    fields = tokens_BL, positions_BL, (tokens_BL > 0).astype(np.int32)
    query_BQD, item_VD = module.apply(
        {'params': params}, *fields, last=True, method='query_and_items'
    )
    score_BV = module.combine(jnp.einsum('BQD,VD->BQV', query_BQD, item_VD))
    assert score_BV.shape == (2, 13)
    for part in (slice(1, 5), slice(5, 13)):
        score_BS = module.combine(jnp.einsum('BQD,VD->BQV', query_BQD, item_VD[part]))
        np.testing.assert_allclose(score_BS, score_BV[:, part], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('model', MODELS)
def test_a_history_is_judged_alike_in_any_company_and_behind_any_padding(model):
    module = build(model, config_lib.parse(flags(model, 'unused')), num_items=12)
    params = initial(module, jax.random.key(0))
    histories = [[3, 4, 5], [7, 8, 9, 1, 2], [6]]

    def encode(several, width):
        tokens_BL = np.array([[0] * (width - len(h)) + h for h in several], np.int32)
        column_BL = np.array([[0] * (width - len(h)) + [*range(len(h))] for h in several], np.int32)
        real_BL = (tokens_BL > 0).astype(np.int32)
        query_BQD, item_VD = module.apply(
            {'params': params}, tokens_BL, column_BL, real_BL, last=True, method='query_and_items'
        )
        return np.asarray(module.combine(jnp.einsum('BQD,VD->BQV', query_BQD, item_VD)))[:, 1:]

    together_BV = encode(histories, 8)
    for i, history in enumerate(histories):
        alone_V = encode([history], len(history))[0]
        np.testing.assert_allclose(alone_V, together_BV[i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    'model', [name for name, row in MODELS.items() if row.layout in ('next', 'pairs')]
)
def test_a_position_of_a_packed_row_is_asked_as_its_prefix_is_judged(model):
    """So nothing leaks from later items or from neighbours, and training is what is judged."""
    module = build(model, config_lib.parse(flags(model, 'unused')), num_items=12)
    params = initial(module, jax.random.key(0))
    histories = [[3, 4, 5, 6, 3, 7, 8, 9], [7, 8, 9, 1, 2], [6]]
    tokens_BL = np.array([[*histories[0], *histories[1], *histories[2], 0, 0]], np.int32)
    segments_BL = np.array([[1] * 8 + [2] * 5 + [3] + [0] * 2], np.int32)
    positions_BL = np.array([[*range(8), *range(5), 0, 0, 0]], np.int32)
    query_BLD = module.apply({'params': params}, tokens_BL, positions_BL, segments_BL)[0]
    column = 0
    for history in histories:
        for end in range(1, len(history) + 1):
            alone = np.array([[0] * (8 - end) + history[:end]], np.int32)
            place = np.array([[0] * (8 - end) + [*range(end)]], np.int32)
            real = np.array([[0] * (8 - end) + [1] * end], np.int32)
            asked_B1D = module.apply({'params': params}, alone, place, real, last=True)[0]
            np.testing.assert_allclose(query_BLD[0, column], asked_B1D[0, 0], rtol=1e-4, atol=1e-5)
            column += 1


def test_a_recipe_speaks_of_fields_that_are_there():
    from fame_jax.recipes import RECIPES

    names = {field.name for field in dataclasses.fields(config_lib.Config)}
    for model, recipe in RECIPES.items():
        assert model in MODELS and set(recipe) <= names

"""Runs, training steps and recommenders that several test files share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fame_jax import stages
from fame_jax.batch import Batch
from fame_jax.config import flags
from fame_jax.data.dataset import Dataset
from fame_jax.losses import LossOptions
from fame_jax.models import registry
from fame_jax.serving import recommender
from fame_jax.stages.open_recommender import serving_model
from fame_jax.training import step

# Training steps.

TINY = {'width': 8, 'num_heads': 2, 'num_blocks': 2, 'max_length': 6, 'dropout': 0.5}


def first_step(name, options=TINY, num_items=10, loss=None):
    """A model's training step, and the state at initialisation."""
    if 'num_experts' in registry.options(registry.find(name)):
        options = {'num_experts': 3, **options}
    module = registry.make(name, options, num_items=num_items)
    params = registry.init_params(module, jax.random.key(0))
    optimizer = optax.adam(1e-3)
    take_step = step.make_step(
        functools.partial(module.objective, loss=loss or LossOptions()), optimizer
    )
    return take_step, step.State(jnp.int32(0), params, optimizer.init(params))


def make_batch(*histories):
    """Histories end to end in one row of eight, as batch.py draws it."""
    tokens = [item for history in histories for item in history[:-1]]
    positions = [i for history in histories for i in range(len(history) - 1)]
    segments = [s for s, history in enumerate(histories, 1) for _ in history[:-1]]
    targets = [item for history in histories for item in history[1:]]
    fields = [
        np.array([[*row, *[0] * (8 - len(row))]], np.int32)
        for row in (tokens, positions, segments, targets)
    ]
    return Batch(*fields, (fields[-1] > 0).astype(np.float32))


BATCH = make_batch([7, 8, 9, 3], [4, 5, 6])
OTHER = make_batch([5, 6, 7], [1, 2, 3, 4])


# Runs.

# Flags of a FAME that is prepared, trained and evaluated in seconds.
SMALL_RUN = [
    *('--progress=none', '--width=8', '--num_blocks=1', '--num_experts=2', '--max_length=10'),
    *('--row_length=16', '--pretrain_epochs=1', '--finetune_epochs=1'),
    '--synthetic=users=60,items=40,facets=1',
]


def sequence_text(users=30, items=6):
    """A sequence file: in each line a user and all items in a random order."""
    draw = np.random.default_rng(0)
    return ''.join(
        f'{u} {" ".join(str(i + 1) for i in draw.permutation(items))}\n'
        for u in range(1, users + 1)
    )


def make_world(folder, histories, users=None):
    """Write a data set with these histories of item indices into a run's folder."""
    num_items = max(max(history) for history in histories)
    items = np.concatenate(histories).astype(np.int32)
    offsets = np.cumsum([0, *map(len, histories)]).astype(np.int64)
    ids = [str(i) for i in range(1, num_items + 1)]
    users = users or [str(u) for u in range(len(histories))]
    Dataset(items, offsets, users, ['', *ids], {'name': 'hand-made'}).save(folder / 'dataset')


SMALL_OPTIONS = {
    'branches': 2,
    'hidden_width': 8,
    'num_levels': 2,
    'max_unit': 2,
    'num_clusters': 2,
}


def open_tiny_run(model, workdir):
    """A run with data and without training, its module and random parameters."""
    known = registry.options(registry.find(model))
    small = {name: value for name, value in SMALL_OPTIONS.items() if name in known}
    given = flags.parse(
        [
            *('--progress=none', '--width=8', '--max_length=10', '--row_length=16'),
            *(['--num_experts=2'] if 'num_experts' in known else []),
            *(f'--model_options={name}={value}' for name, value in small.items()),
            '--synthetic=users=60,items=40,facets=1',
            *(f'--model={model}', f'--workdir={workdir}'),
        ]
    )
    context = stages.open_run(given)
    stages.STAGES['prepare'](context)
    module = context.module('finetune' if context.model.backbone else 'pretrain')
    params = jax.tree.map(lambda x: 5 * x, registry.init_params(module, jax.random.key(1)))
    return context, module, params


# Recommenders.

ITEM_IDS = ['', 'a', 'b', '7', '007', 'ü', '日本', 'x y', '"q"', '<b>', 'ab', 'c', 'd']
NUM_ITEMS = len(ITEM_IDS) - 1
COUNT_V = np.array([0, 3, 9, 1, 9, 0, 2, 7, 4, 8, 5, 6, 1])


def last_item(params, tokens_BL, positions_BL, segments_BL):
    """One query, the row of the parameters at the last item's index."""
    return params[tokens_BL[:, -1]][:, None]


def make_recommender(encode=last_item, combine=recommender.single_query, max_length=4, **options):
    """A recommender over ITEM_IDS, its parameters and its item vectors, both random.

    Options are those of Recommender, such as other item_ids.
    """
    draw = np.random.default_rng(0)
    params, item_VD = draw.normal(size=(2, NUM_ITEMS + 1, 3)).astype(np.float32)
    model = recommender.ServedModel(
        encode, combine, jnp.asarray(params), jnp.asarray(item_VD), max_length
    )
    options = {'item_ids': ITEM_IDS, 'count_V': COUNT_V, **options}
    return recommender.Recommender(model, **options), params, item_VD


# A hand-made FAME: its query is the last item's vector, of which each head has a half. Expert 0
# attends to all items alike, expert 1 to the last and expert 2 to the first.
GATE_H = np.array([0.25, 0.75])
ROUTER_HN = np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])


def fame_intermediates(params, tokens_BL, positions_BL, segments_BL):
    """The intermediates of the hand-made FAME."""
    batch, length = tokens_BL.shape
    last_BD = params[tokens_BL[:, -1]]
    first_half_D = jnp.arange(last_BD.shape[1])[None] < 2
    halves_BHD = jnp.stack([last_BD * first_half_D, last_BD * ~first_half_D], axis=1)
    attention_NBL = [
        segments_BL / segments_BL.sum(1, keepdims=True),
        jnp.zeros((batch, length)).at[:, -1].set(1),
        (segments_BL > 0) & (positions_BL == 0),
    ]
    attention_BNL = jnp.stack(attention_NBL, axis=1).astype(jnp.float32)
    return {
        'gate_BH': jnp.broadcast_to(GATE_H, (batch, 2)),
        'head_BHD': halves_BHD / GATE_H[None, :, None],
        'router_BHN': jnp.broadcast_to(ROUTER_HN, (batch, 2, 3)),
        'positions_BLHN': jnp.broadcast_to(ROUTER_HN, (batch, length, 2, 3)),
        'attention_BHNL': jnp.broadcast_to(attention_BNL[:, None], (batch, 2, 3, length)),
    }


def make_fame(item_ids=ITEM_IDS, count_V=COUNT_V, titles=(), max_length=5, **options):
    """A recommender of the hand-made FAME with random item vectors.

    Options are those of Recommender, such as the names of the heads.
    """
    draw = np.random.default_rng(0)
    item_VD = jnp.asarray(draw.normal(size=(len(item_ids), 4)).astype(np.float32))
    model = recommender.ServedModel(
        last_item, recommender.single_query, item_VD, item_VD, max_length, fame_intermediates
    )
    # Each head's view of an item is the half that the head has of the query.
    model = model._replace(facet_HDK=jnp.eye(4).reshape(4, 2, 2).transpose(1, 0, 2))
    card = {'model': 'FAME by hand'}
    return recommender.Recommender(model, item_ids, count_V, titles, card, **options)


def recommender_of(run, module, params):
    """The recommender of a run, with made-up titles."""
    model = serving_model(module, params, run.config.data.max_length)
    count_V = np.bincount(run.data.items, minlength=run.data.num_items + 1)
    titles = ['', *(f'title {n}' for n in range(1, run.data.num_items + 1))]
    return recommender.Recommender(model, run.data.item_ids, count_V, titles, {'model': 'a test'})


def histories_of(run):
    """All histories of the data set, and an unknown, an empty, a repetitive and a long one."""
    data = run.data
    histories = [
        [data.item_ids[item] for item in data.items[start:end]]
        for start, end in zip(data.offsets[:-1], data.offsets[1:])
    ]
    return [*histories, ['unknown'], [], [data.item_ids[3]] * 5, data.item_ids[1:] * 3]


def largest_difference(first, second):
    """Of all leaves but the keys' biases.

    The gradient by a key's bias is 0, since it moves all scores of a query alike; Adam makes steps
    of its rounding.
    """
    differences = [
        np.abs(np.asarray(leaf) - np.asarray(other)).max()
        for (path, leaf), other in zip(
            jax.tree_util.tree_leaves_with_path(first), jax.tree.leaves(second), strict=True
        )
        if path[-1].key != 'key_bias'
    ]
    assert differences
    return max(differences)

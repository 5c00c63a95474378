"""Checks that every model has to pass, whatever its paper.

`models/generic_test.py` runs them over the registry; the test of docs/adding-a-model.md runs them
over the model of that page.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
from fixtures import new_key, parameter_shapes, quick_jit

from fame_jax.batch import Batch, PairedBatch
from fame_jax.losses import LossOptions
from fame_jax.models import registry

V = 12  # items
HISTORIES = [[3, 4, 5, 6, 3, 7, 8, 9], [7, 8, 9, 1, 2], [6]]


def right_aligned(histories, width):
    """Tokens, positions and segments of rows that end with a history each."""
    tokens, positions, segments = np.zeros((3, len(histories), width), np.int32)
    for b, history in enumerate(histories):
        tokens[b, width - len(history) :] = history
        positions[b, width - len(history) :] = range(len(history))
        segments[b, width - len(history) :] = 1
    return tokens, positions, segments


def ring(start, length):
    """A walk of some steps round the ring of items 1..V."""
    return [(start + i) % V + 1 for i in range(length)]


def ring_batch(layout):
    """Walks from every item of the ring, in rows of a layout."""
    walks = [ring(start, 7) for start in range(V)]
    if layout == 'prefixes':
        prefixes = [(walk[:n], walk[n]) for walk in walks for n in (1, 6)]
        tokens, positions, segments = right_aligned([history for history, _ in prefixes], 6)
        targets = np.zeros_like(tokens)
        targets[:, -1] = [target for _, target in prefixes]
        return Batch(tokens, positions, segments, targets, (targets > 0).astype(np.float32))
    if layout == 'masked':
        tokens, positions, segments = right_aligned(walks, 7)
        return Batch(tokens, positions, segments, tokens, np.ones(tokens.shape, np.float32))
    tokens, positions, segments = right_aligned([walk[:-1] for walk in walks], 6)
    targets = np.array([walk[1:] for walk in walks], np.int32)
    batch = Batch(tokens, positions, segments, targets, np.ones(tokens.shape, np.float32))
    if layout == 'next':
        return batch
    # The second prefix of a history's fourth position: the two items before the same target.
    pairs = right_aligned([walk[2:4] for walk in walks], 6)
    anchor = np.full(tokens.shape, -1, np.int32)
    anchor[:, -1] = np.arange(V) * 6 + 3
    return PairedBatch(*batch, *pairs, anchor)


@functools.cache
def initialiser(module):
    """The compiled key -> initial parameters."""
    return quick_jit(functools.partial(registry.init_params, module))


@functools.cache
def forward(module, last=True):
    """The compiled model: (params, tokens, positions, segments) -> scores [B, V + 1], queries."""

    def score(params, *fields):
        query_BQD, item_VD, _ = module.apply(
            {'params': params}, *fields, last=last, method='forward'
        )
        return module.combine(jnp.einsum('BQD,VD->BQV', query_BQD, item_VD)), query_BQD, item_VD

    return quick_jit(score)


def check_facts(cls):
    """The class states what the rest of the program asks for."""
    assert cls.title
    assert cls.row_layout in ('next', 'masked', 'pairs', 'prefixes')
    assert cls.losses and set(cls.losses) <= {'ce', 'bce', 'sampled'}
    assert list(inspect.signature(cls.objective).parameters) == [
        *('self', 'params', 'batch', 'key', 'loss')
    ]
    for values in cls.readings.values():
        assert values.keys() <= registry.options(cls).keys()
    if cls.backbone:
        backbone = cls(num_items=V).backbone_module()
        assert type(backbone) is cls.backbone
        assert all(
            getattr(backbone, name) == getattr(cls(), name)
            for name in registry.options(type(backbone))
        )
    if cls.frozen_params:
        assert set(cls.frozen_params) <= parameter_shapes(cls(num_items=V)).keys()
    cls().validate()


def check_shapes(module):
    """Shapes and dtypes of parameters, queries and item vectors."""
    padding = np.zeros((2, 5), np.int32)

    def all_of_it():
        params = registry.init_params(module, new_key(0))
        call = functools.partial(module.apply, {'params': params}, padding, padding, padding)
        query_BLD, item_VD, _ = call(train=True, rngs={'dropout': new_key(1)}, method='forward')
        return params, query_BLD, item_VD, call(last=True)[0]

    params, query_BLD, item_VD, last_B1D = jax.eval_shape(all_of_it)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('float32')}
    width = item_VD.shape[1]
    assert width in (module.width, module.width + 1)  # a bias, or the share of a level
    assert item_VD.shape == (module.num_items + 1, width)
    assert item_VD.dtype == jnp.dtype(module.dtype)
    assert query_BLD.dtype == last_B1D.dtype
    if module.row_layout == 'prefixes':  # queries of the row, and not of its positions
        assert query_BLD.shape == last_B1D.shape and last_B1D.shape[::2] == (2, width)
    else:
        assert (query_BLD.shape, last_B1D.shape) == ((2, 5, width), (2, 1, width))
        assert query_BLD.dtype == item_VD.dtype


def check_items_in_parts(module, params):
    """Scores of a part of the catalogue are those of the whole; item vectors are row by row."""
    score_BV, query_BQD, item_VD = forward(module)(params, *right_aligned(HISTORIES, 8))
    assert score_BV.shape == (3, V + 1)
    for part in (slice(1, 5), slice(5, V + 1)):
        part_BV = module.combine(np.einsum('BQD,VD->BQV', query_BQD, item_VD[part]))
        np.testing.assert_allclose(part_BV, score_BV[:, part], rtol=1e-5, atol=1e-5)
    if module.row_wise_items:
        transformed_VD = module.item_transform(params['item_table'])
        np.testing.assert_allclose(transformed_VD, item_VD, rtol=1e-6, atol=1e-6)


def check_company(module, params):
    """A history's scores depend neither on the other rows nor on the padding before it."""
    encode = forward(module)
    score_BV, *_ = encode(params, *right_aligned(HISTORIES, 8))
    for b, history in enumerate(HISTORIES):
        others = [[]] * 3
        others[b] = history
        alone_BV, *_ = encode(params, *right_aligned(others, 8))
        np.testing.assert_allclose(alone_BV[b, 1:], score_BV[b, 1:], rtol=1e-4, atol=1e-5)
    wide_BV, *_ = encode(params, *right_aligned(HISTORIES[::-1], 11))
    np.testing.assert_allclose(wide_BV[::-1, 1:], score_BV[:, 1:], rtol=1e-4, atol=1e-5)


def check_causal(module, params):
    """In a packed row, a position's query is that of its prefix alone, as in ranking.

    So no position depends on later items or on other histories of its row.
    """
    tokens, positions, segments = np.zeros((3, 1, 16), np.int32)
    column = 0
    for number, history in enumerate(HISTORIES, 1):
        place = slice(column, column + len(history))
        tokens[0, place], positions[0, place] = history, range(len(history))
        segments[0, place] = number
        column += len(history)
    _, query_BLD, _ = forward(module, last=False)(params, tokens, positions, segments)
    prefixes = [history[:n] for history in HISTORIES for n in range(1, len(history) + 1)]
    _, alone_B1D, _ = forward(module)(params, *right_aligned(prefixes, 8))
    np.testing.assert_allclose(query_BLD[0, :column], alone_B1D[:, 0], rtol=1e-4, atol=1e-5)


def check_padding(module, params):
    """Rows of padding have finite outputs and gradients."""
    padding = np.zeros((2, 5), np.int32)

    def total(params):
        query_BLD, parts = module.apply({'params': params}, padding, padding, padding)
        return jnp.sum(query_BLD), (query_BLD, parts)

    for leaf in jax.tree.leaves(quick_jit(jax.grad(total, has_aux=True))(params)):
        assert np.isfinite(leaf).all()


def check_initialisation(module):
    """Initial parameters are a function of the key."""
    draw = initialiser(module)
    one, same, other = (draw(new_key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert np.any(one['item_table'] != other['item_table'])


def check_learning(module, idle=(), learning_rate=0.01, ordered=True):
    """Trained on walks round a ring, the model ranks the next item of the ring first.

    If not `ordered`, the model does not know at which end a walk goes on: the next item and the one
    before the walk are the first two. Every parameter moves but those whose path has one of the
    names in `idle`, and stays finite.
    """
    batch = jax.tree.map(jnp.asarray, ring_batch(module.row_layout))
    params = initialiser(module)(new_key(0))
    if module.before_epoch:
        params = module.before_epoch(params, [batch], new_key(2))
    optimizer = optax.adam(learning_rate)
    # Models of masked items predict a part of the positions in each step.
    steps = 600 if module.row_layout == 'masked' else 150

    def step(carry, key):
        params, state = carry

        def mean(params):
            total, weight, metrics = module.objective(params, batch, key, LossOptions())
            assert all(value.shape == () for value in metrics.values())
            return total / weight

        loss, gradient = jax.value_and_grad(mean)(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), loss

    def train(params):
        keys = jax.random.split(new_key(1), steps)
        (params, _), loss_S = jax.lax.scan(step, (params, optimizer.init(params)), keys)
        return params, loss_S

    trained, loss_S = quick_jit(train)(params)
    assert np.isfinite(loss_S).all() and loss_S[-10:].mean() < loss_S[:3].mean() / 2
    moved = jax.tree.map(lambda old, new: bool(np.any(np.asarray(old) != new)), params, trained)
    paths = [
        jax.tree_util.keystr(p) for p, m in jax.tree_util.tree_leaves_with_path(moved) if not m
    ]
    assert [path for path in paths if not any(name in path for name in idle)] == []
    walks = [ring(start, 7) for start in range(V)]
    rows = right_aligned([walk[:-1] for walk in walks], 6)
    score_BV = np.array(forward(module)(trained, *rows)[0])
    for b, walk in enumerate(walks):  # items of the history are not ranked
        score_BV[b, [0, *walk[:-1]]] = -np.inf
    best_BK = np.argsort(-score_BV, axis=1)[:, : 1 if ordered else 2]
    next_B1 = np.array([walk[-1:] for walk in walks])
    assert np.mean((best_BK == next_B1).any(axis=1)) >= 0.9

"""CL4SRec's objective against explicit loops over hand-written views; its operators."""

from functools import partial

import jax
import numpy as np
import pytest
from fixtures import (
    BATCH,
    assert_close,
    compile_gradient,
    compile_objective,
    hidden_states,
    make_model,
    new_key,
    quick_jit,
)
from oracles import nt_xent_loop

from fame_jax.models import augmentations

CONTRAST = {'contrast_weight': 0.3, 'contrast_temperature': 0.5, 'contrast_anchors': 8}
SHARES = {'crop_share': 0.5, 'mask_share': 0.5, 'reorder_share': 0.75}

# Of BATCH, histories 1 2 3 4, 6 7 and 8 side by side: a crop and a mask, shuffles and a mask.
ONE = [
    [[0, 2, 3, 0, 6, 13, 8, 0], [0] * 8, [0] * 8],
    [[0, 0, 1, 0, 0, 1, 0, 0], [0] * 8, [0] * 8],
    [[0, 1, 1, 0, 2, 2, 3, 0], [0] * 8, [0] * 8],
]
OTHER = [
    [[1, 3, 2, 4, 7, 6, 8, 0], [0] * 8, [0] * 8],
    [[0, 1, 2, 3, 0, 1, 0, 0], [0] * 8, [0] * 8],
    [[1, 1, 1, 1, 2, 2, 3, 0], [0] * 8, [0] * 8],
]
ONE, OTHER = (tuple(np.array(view, np.int32)) for view in (ONE, OTHER))
ENDS = ([2, 5, 6], [3, 5, 6])


@pytest.fixture(scope='module')
def model():
    return make_model('cl4srec', **CONTRAST, **SHARES, positions='both')


@pytest.mark.parametrize('anchors', [8, 2])
def test_the_ends_of_two_views_are_contrasted(model, anchors, monkeypatch):
    module, params = model
    calls = []

    def written(key, fields, operators):
        calls.append((fields, operators))
        return tuple(tuple(field[: len(fields[0])] for field in view) for view in (ONE, OTHER))

    monkeypatch.setattr(augmentations, 'two_views', written)
    few = module.clone(contrast_anchors=anchors)
    total, count, metrics = compile_objective(few)(params, BATCH, new_key(0))
    without = module.clone(contrast_weight=0.0)
    item_total, item_count, _ = compile_objective(without)(params, BATCH, new_key(0))
    one, other = (
        hidden_states(module, params, view)[ends][:anchors]
        for view, ends in zip((ONE, OTHER), ENDS)
    )
    contrast = nt_xent_loop(one, other, 0.5)
    assert_close(metrics['contrast'], contrast)
    assert_close(total / count, item_total / item_count + 0.3 * contrast)
    assert count == item_count == 7
    fields, operators = calls[0]
    assert [operator.func for operator in operators] == [
        augmentations.crop,
        augmentations.mask,
        augmentations.reorder,
    ]
    assert [operator.keywords for operator in operators] == [
        {'share': 0.5},
        {'share': 0.5, 'mask_id': 13},
        {'share': 0.75},
    ]
    assert [len(field) for field in fields] == [min(anchors, 3)] * 3


@pytest.fixture(scope='module')
def train(model):
    """(batch, seed) -> ((sum, count), gradient)."""
    module, params = model
    f = compile_gradient(module)
    return lambda batch, seed: f(params, batch, new_key(seed))


def test_views_are_drawn_from_the_key(train):
    first, second, again = (train(BATCH, seed)[0] for seed in (0, 1, 0))
    assert first == again and first[0] != second[0] and first[1] == second[1]


def test_the_mask_is_learned_and_is_no_item(model, train):
    module, params = model
    # In four draws of three histories some view has a mask.
    slopes = [np.abs(train(BATCH, seed)[1]['mask_vector']).max() for seed in range(4)]
    assert max(slopes) > 0
    item_VD = quick_jit(partial(module.apply, method='item_vectors'))({'params': params})
    assert item_VD.shape == (13, 8)


def test_a_batch_of_padding_is_zero_and_finite(train):
    (total, count), gradient = train(jax.tree.map(np.zeros_like, BATCH), 0)
    assert total == count == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.slow
@pytest.mark.parametrize('dropout, alike', [(0.0, True), (0.5, False)])
def test_rows_encoded_together_have_their_own_dropout(dropout, alike):
    module, params = make_model('cl4srec', dropout=dropout)
    f = quick_jit(partial(augmentations.encode, module))
    one_TD, other_TD = f(params, new_key(0), ONE, ONE)
    assert np.allclose(one_TD, other_TD, atol=1e-5) == alike
    if alike:
        assert_close(one_TD, hidden_states(module, params, ONE))

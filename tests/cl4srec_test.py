"""CL4SRec's loss against explicit loops over hand-written views; what its operators are told."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layers_test import assert_close, float64, new_key, quick_jit, random_tree
from objective_test import BATCH, OPTIONS
from sasrec_test import encode

from fame_jax.models import cl4srec, objective, views
from fame_jax.models.cl4srec import CL4SRec

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


def small(module_type, seed=0, **options):
    """A module with parameters large enough for every part of it to show."""
    sizes = {'num_items': 12, 'width': 8, 'num_blocks': 1, 'num_heads': 2, 'inner_multiple': 2}
    kinds = {'activation': 'gelu', 'positions': 'both', 'similarity': 'cosine'}
    items = {'temperature': 0.5, 'tied_items': True, 'item_training': 'trained'}
    rest = {'dropout': 0.0, 'max_length': 6, 'attention_bias': True, 'attention_scale': 'head'}
    module = module_type(**sizes | kinds | items | rest | {'dtype': jnp.float32} | options)
    fields = BATCH[:3]
    init = partial(module.init, method='query_and_items')
    return module, random_tree(jax.eval_shape(init, new_key(0), *fields)['params'], seed)


def nt_xent_loop(one, other, temperature):
    """The mean over all views of -log of the softmax of the other view among all but itself."""
    z = [*one, *other]
    n = len(one)
    total = 0.0
    for i in range(2 * n):
        powers = {
            j: math.exp(sum(a * b for a, b in zip(z[i], z[j])) / temperature)
            for j in range(2 * n)
            if j != i
        }
        total -= math.log(powers[(i + n) % (2 * n)] / sum(powers.values()))
    return total / (2 * n)


def encoded(module, params, fields):
    """What is compared, before it is made comparable; float64, positions end to end."""
    h_BLD, _ = encode(module, params, *fields, method='encode')
    return float64(h_BLD).reshape(-1, module.width)


def summed(loss, module, **options):
    """(params, batch, key) -> (sum, count)."""
    return quick_jit(partial(loss, module, **OPTIONS | options))


def graded(loss, module, **options):
    """(params, batch, key) -> ((sum, count), gradient)."""
    f = partial(loss, module, **OPTIONS | options)
    return quick_jit(jax.value_and_grad(f, has_aux=True))


@pytest.fixture(scope='module')
def model():
    return small(CL4SRec)


@pytest.mark.parametrize('anchors', [8, 2])
def test_the_ends_of_two_views_are_contrasted(model, anchors, monkeypatch):
    module, params = model
    told = []

    def written(key, fields, operators):
        told.append((fields, operators))
        return tuple(tuple(field[: len(fields[0])] for field in view) for view in (ONE, OTHER))

    monkeypatch.setattr(views, 'two_views', written)
    options = CONTRAST | SHARES | {'contrast_anchors': anchors}
    total, count = summed(cl4srec.contrast_views, module, **options)(params, BATCH, new_key(0))
    item_total, item_count = summed(objective.next_item, module)(params, BATCH, new_key(0))
    one, other = (
        encoded(module, params, view)[ends][:anchors] for view, ends in zip((ONE, OTHER), ENDS)
    )
    assert_close(total / count, item_total / item_count + 0.3 * nt_xent_loop(one, other, 0.5))
    assert count == item_count == 7
    ((fields, operators),) = told
    assert [operator.func for operator in operators] == [views.crop, views.mask, views.reorder]
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
    f = graded(cl4srec.contrast_views, module, **CONTRAST | SHARES)
    return lambda batch, seed: f(params, batch, new_key(seed))


def test_views_are_drawn_from_the_key(train):
    first, second, again = (train(BATCH, seed)[0] for seed in (0, 1, 0))
    assert first == again and first[0] != second[0] and first[1] == second[1]


def test_the_mask_is_learned_and_nobodys_target(model, train):
    module, params = model
    # In four draws of three histories some view has a mask.
    slopes = [np.abs(train(BATCH, seed)[1]['mask_vector']).max() for seed in range(4)]
    assert max(slopes) > 0
    item_VD = quick_jit(partial(module.apply, method='item_vectors'))({'params': params})
    assert item_VD.shape == (13, 8)


def test_a_step_of_padding_is_no_fault(train):
    (total, count), gradient = train(jax.tree.map(np.zeros_like, BATCH), 0)
    assert total == count == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize('dropout, alike', [(0.0, True), (0.5, False)])
def test_rows_that_are_encoded_together_drop_out_apart(dropout, alike):
    module, params = small(CL4SRec, dropout=dropout)
    f = quick_jit(partial(views.encode, module))
    one_TD, other_TD = f(params, new_key(0), ONE, ONE)
    assert np.allclose(one_TD, other_TD, atol=1e-5) == alike
    if alike:
        assert_close(one_TD, encoded(module, params, ONE))

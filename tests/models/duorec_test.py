"""DuoRec's objective against explicit loops over hand-written pairs of prefixes."""

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
)
from oracles import nt_xent_loop

from fame_jax.batch import PairedBatch

CONTRAST = {'contrast_weight': 0.3, 'contrast_temperature': 0.5, 'contrast_anchors': 4}

# BATCH holds 1 2 3 4, 6 7 and 8. The third position of the first history is followed by 4, like
# 9 10; the first of the second by 7, like 2 5 11; nothing else is followed by what follows 8.
PAIRS = {
    'tokens': [[9, 10, 8, 0, 0, 0, 0, 0], [2, 5, 11, 0, 0, 0, 0, 0], [0] * 8],
    'positions': [[0, 1, 0, 0, 0, 0, 0, 0], [0, 1, 2, 0, 0, 0, 0, 0], [0] * 8],
    'segments': [[1, 1, 2, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0], [0] * 8],
    'anchor': [[-1, 2, 6, -1, -1, -1, -1, -1], [-1, -1, 4, -1, -1, -1, -1, -1], [-1] * 8],
}
PAIRED = PairedBatch(*BATCH, *(np.array(PAIRS[name], np.int32) for name in PAIRS))
OWN, PAIRED_WITH = [2, 6, 4], [1, 2, 10]


@pytest.fixture(scope='module')
def model():
    return make_model('duorec', **CONTRAST, positions='both')


@pytest.fixture(scope='module')
def item_loss(model):
    module, params = model
    without = module.clone(contrast_weight=0.0)
    total, count, _ = compile_objective(without)(params, PAIRED, new_key(0))
    return total / count


@pytest.fixture(scope='module')
def train(model):
    """batch -> ((sum, count), gradient)."""
    module, params = model
    f = compile_gradient(module)
    return lambda batch: f(params, batch, new_key(0))


@pytest.mark.parametrize('anchors', [4, 2])
def test_a_prefix_is_contrasted_with_its_pair(model, item_loss, train, anchors):
    module, params = model
    if anchors == CONTRAST['contrast_anchors']:
        total, count = train(PAIRED)[0]
    else:
        f = compile_objective(module.clone(contrast_anchors=anchors))
        total, count, _ = f(params, PAIRED, new_key(0))
    one = hidden_states(module, params, BATCH[:3])[OWN][:anchors]
    pairs = PAIRED.pair_tokens_BL, PAIRED.pair_positions_BL, PAIRED.pair_segments_BL
    other = hidden_states(module, params, pairs)[PAIRED_WITH][:anchors]
    assert_close(total / count, item_loss + 0.3 * nt_xent_loop(one, other, 0.5))
    assert count == 7


def test_without_pairs_it_is_the_loss_of_the_items(item_loss, train):
    alone = PAIRED._replace(anchor_BL=np.full_like(PAIRED.anchor_BL, -1))
    (total, count), gradient = train(alone)
    assert_close(total / count, item_loss)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_a_single_pair_has_no_negatives(item_loss, train):
    """The contrast is a softmax over one view, and its loss 0."""
    anchor_BL = np.where(PAIRED.anchor_BL == 6, PAIRED.anchor_BL, -1)
    (total, count), _ = train(PAIRED._replace(anchor_BL=anchor_BL))
    assert_close(total / count, item_loss)

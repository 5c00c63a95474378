"""Routers, active experts, their balance and use, against loops; the ways to the same attention."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fame_test import make_block
from layers_test import assert_close, new_key, quick_jit
from sasrec_test import PACKED, make_batch, make_model

from fame_jax import config as config_lib
from fame_jax.config import Config
from fame_jax.errors import UserError
from fame_jax.models import build, experts, layers

# Two positions, one head, four experts.
SHARES = np.array([[[[0.1, 0.4, 0.3, 0.2]], [[0.25, 0.25, 0.25, 0.25]]]], np.float32)


def test_the_largest_shares_are_chosen_and_sum_to_one():
    router_BLHN, pick_BLHAN = experts.choose(SHARES, 2)
    assert_close(router_BLHN[0, :, 0], [[0, 4 / 7, 3 / 7, 0], [0.5, 0.5, 0, 0]])
    assert np.argmax(pick_BLHAN[0, :, 0], axis=-1).tolist() == [[1, 2], [0, 1]]  # a tie: the first
    assert np.unique(pick_BLHAN).tolist() == [0, 1]


def test_one_active_expert_counts_alone():
    router_BLHN, _ = experts.choose(SHARES, 1)
    assert router_BLHN[0, :, 0].tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]


def test_gather_and_spread_move_what_is_picked():
    rng = np.random.default_rng(0)
    query_BLHNK, weight_BHAQS = rng.normal(size=(1, 2, 1, 4, 3)), rng.normal(size=(1, 1, 2, 2, 5))
    _, pick_BLHAN = experts.choose(SHARES, 2)
    taken = experts.gather(query_BLHNK.astype(np.float32), pick_BLHAN)
    spread = experts.spread(weight_BHAQS.astype(np.float32), pick_BLHAN)
    expected = np.zeros((4, 2, 5))
    for position, chosen in enumerate([[1, 2], [0, 1]]):
        assert_close(taken[0, position, 0], query_BLHNK[0, position, 0, chosen])
        for place, n in enumerate(chosen):
            expected[n, position] = weight_BHAQS[0, 0, place, position]
    assert_close(spread[0, 0], expected)


def test_an_idle_experts_share_has_no_gradient_and_the_active_ones_sum_to_none():
    def first(shares):
        return experts.choose(shares, 2)[0][0, 0, 0, 1]

    slope_N = quick_jit(jax.grad(first))(jnp.asarray(SHARES))[0, 0, 0]
    total = 0.4 + 0.3
    assert_close(slope_N, [0, 0.3 / total**2, -0.4 / total**2, 0])


# The block.


def forward(block, params, x_BLD, mask_BLL, train=False):
    """Output and intermediates, dropout from one key."""
    f = partial(block.apply, train=train, last=False, rngs={'dropout': new_key(3)})
    return quick_jit(f)(params, x_BLD, mask_BLL)


def gradient(block, params, x_BLD, mask_BLL, train=False):
    """The same, and the gradient of what is no padding by parameters and input."""
    direction_BLD = np.random.default_rng(1).normal(size=x_BLD.shape).astype(np.float32)
    direction_BLD *= np.diagonal(mask_BLL, axis1=1, axis2=2)[..., None]

    def total(params, x_BLD):
        rngs = {'dropout': new_key(3)}
        out = block.apply(params, x_BLD, mask_BLL, train=train, last=False, rngs=rngs)
        return jnp.sum(out[0] * direction_BLD), out

    slopes, out = quick_jit(jax.grad(total, (0, 1), has_aux=True))(params, x_BLD)
    return out, slopes


def test_all_experts_active_is_dense_exactly():
    dense, params, *inputs, _ = make_block(5, routing='inputs')
    expected = gradient(dense, params, *inputs)
    found = gradient(dense.clone(active_experts=3), params, *inputs)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_experts_that_are_gathered_give_what_dense_ones_give(monkeypatch):
    """All of them gathered, in the order of their shares, without the short cut for all."""
    dense, params, *inputs, _ = make_block(5, routing='inputs')
    expected = gradient(dense, params, *inputs)
    monkeypatch.setattr(
        type(dense), 'choose', lambda self, share, mask: experts.choose(share, self.num_experts)
    )
    jax.tree.map(assert_close, gradient(dense, params, *inputs), expected)


@pytest.mark.parametrize('routing', ['outputs', 'inputs'])
def test_idle_experts_have_no_share(routing):
    block, params, *inputs, _ = make_block(5, routing=routing, active_experts=2)
    _, parts = forward(block, params, *inputs)
    idle_BLHN = np.asarray(parts['router_BLHN']) == 0
    assert (idle_BLHN.sum(axis=-1) == 1).all()
    attended_BLHN = np.moveaxis(parts['attention_BHNQS'].sum(axis=-1), 3, 1)
    assert_close(attended_BLHN, ~idle_BLHN if routing == 'inputs' else np.ones(idle_BLHN.shape))


def test_attention_of_active_experts_is_over_as_many_queries(monkeypatch):
    seen, attend = [], layers.attend
    monkeypatch.setattr(
        layers, 'attend', lambda query, *rest: seen.append(query.shape) or attend(query, *rest)
    )
    for routing, width in (('outputs', 3), ('inputs', 2)):
        block, params, x_BLD, mask_BLL, _ = make_block(2, routing=routing, active_experts=2)
        seen.clear()
        jax.eval_shape(partial(block.apply, train=False, last=True), params, x_BLD, mask_BLL)
        assert seen == [(3, 1, 2, width, 4)]


def test_taking_turns_changes_neither_output_nor_gradient():
    """With dropout too: the same entries are dropped, in both passes."""
    block, params, *inputs, _ = make_block(5, dropout=0.5)
    expected = gradient(block, params, *inputs, train=True)
    found = gradient(block.clone(remat='experts'), params, *inputs, train=True)
    jax.tree.map(assert_close, found, expected)


@pytest.mark.parametrize('remat', ['none', 'experts'])
def test_taking_turns_keeps_no_weights_for_the_backward_pass(remat):
    block, params, *inputs, _ = make_block(5, dropout=0.5, remat=remat)
    rngs = {'dropout': new_key(0)}

    def total(params):
        return block.apply(params, *inputs, train=True, last=False, rngs=rngs)[0].sum()

    _, pull = jax.eval_shape(partial(jax.vjp, total), params)
    kept = {leaf.shape for leaf in jax.tree.leaves(pull) if leaf.dtype == jnp.float32}
    assert ((4, 2, 3, 5, 5) in kept) == (remat == 'none')


def test_fused_is_the_einsums():
    block, params, *inputs, _ = make_block(5)
    expected = gradient(block, params, *inputs)
    jax.tree.map(assert_close, gradient(block.clone(attention='fused'), params, *inputs), expected)


def test_fused_computes_no_weights_that_nobody_reads():
    block, params, x_BLD, mask_BLL, _ = make_block(5, attention='fused')

    def lines(read):
        f = jax.jit(lambda p: read(block.apply(p, x_BLD, mask_BLL, train=False, last=False)))
        return f.lower(params).compile().as_text().count('exponential')

    assert lines(lambda out: out[0]) < lines(lambda out: (out[0], out[1]['attention_BHNQS']))


def test_dropout_of_the_weights_alone():
    """All weights are dropped and nothing else: no value has a say."""
    block, params, *inputs, _ = make_block(2, attention_dropout=1.0)
    kept_BLD, _ = forward(block, params, *inputs, train=True)
    p = params['params']
    none = p | {name: 0 * p[name] for name in ('value', 'value_bias')}
    none_BLD, _ = forward(block, {'params': none}, *inputs)
    assert_close(kept_BLD, none_BLD)


# Balance and use.


def balance_loop(share_BLHN, router_BLHN, real_BL):
    num_heads, num_experts = share_BLHN.shape[-2:]
    total, places = 0.0, np.argwhere(real_BL)
    for h in range(num_heads):
        chosen = [n for b, i in places for n in range(num_experts) if router_BLHN[b, i, h, n] > 0]
        for n in range(num_experts):
            part = chosen.count(n) / len(chosen)
            mean = sum(share_BLHN[b, i, h, n] for b, i in places) / len(places)
            total += num_experts * part * mean / num_heads
    return total


def test_balance_matches_the_loop():
    rng = np.random.default_rng(0)
    logit_BLHN = rng.normal(size=(3, 4, 2, 5))
    share_BLHN = np.exp(logit_BLHN) / np.exp(logit_BLHN).sum(axis=-1, keepdims=True)
    real_BL = rng.random((3, 4)) < 0.6
    router_BLHN, _ = experts.choose(share_BLHN.astype(np.float32), 2)
    found, slope_BLHN = quick_jit(jax.value_and_grad(experts.balance))(
        share_BLHN.astype(np.float32), router_BLHN, real_BL
    )
    assert_close(found, balance_loop(share_BLHN, np.asarray(router_BLHN), real_BL))
    for b, i, h in np.ndindex(3, 4, 2):  # less of what is chosen often
        chosen_N = (np.asarray(router_BLHN)[real_BL][:, h] > 0).sum(axis=0)
        expected_N = 5 * chosen_N / chosen_N.sum() / real_BL.sum() / 2 * real_BL[b, i]
        assert_close(slope_BLHN[b, i, h], expected_N)


def test_balance_is_one_of_even_experts_and_n_of_one_alone():
    alone_BLHN = np.broadcast_to(np.eye(4)[0], (2, 3, 1, 4))
    assert_close(experts.balance(alone_BLHN, alone_BLHN, np.ones((2, 3), bool)), 4.0)
    even_BLHN = np.full((1, 4, 1, 4), 0.25)
    turns_BLHN = np.eye(4)[None, :, None]
    assert_close(experts.balance(even_BLHN, turns_BLHN, np.ones((1, 4), bool)), 1.0)


def test_use_by_hand():
    rows = [[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]
    router_BLHN = np.array([rows], np.float32)[:, :, None]
    found = experts.use(router_BLHN, np.array([[True, True, False]]))
    assert_close(found['share'], [[0.75, 0.25, 0]])
    assert_close(found['active'], [[1, 0.5, 0]])
    assert found['dead'] == 1
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) / np.log(3)
    assert_close(found['entropy'], [entropy])


def test_use_of_one_expert():
    assert experts.use(np.ones((1, 2, 2, 1)), np.ones((1, 2), bool))['entropy'] is None


def test_the_objective_holds_the_weighted_balance():
    """Of the real positions alone, which the mask's diagonal tells."""
    options = {'routing': 'inputs', 'active_experts': 2}
    module, params = make_model('fame', **options)
    batch = make_batch(PACKED)

    def both(params):
        configs = (Config(balance_weight=w, chunk_tokens=0, **options) for w in (0.0, 0.5))
        several = [build.build_objective('fame', config) for config in configs]
        dense = module.clone(active_experts=0)
        parts = [m.apply({'params': params}, *batch[:3])[1] for m in (dense, module)]
        routers = [p['facet_block']['router_BLHN'] for p in parts]
        return [f(module, params, batch, new_key(0)) for f in several], routers

    ((plain, count), (found, same)), (share_BLHN, router_BLHN) = quick_jit(both)(params)
    assert same == count
    term = balance_loop(share_BLHN, router_BLHN, batch.segments_BL > 0)
    assert_close((found - plain) / count, 0.5 * term)


def test_the_cloze_objective_takes_the_balance_too():
    options = {'routing': 'inputs', 'active_experts': 2, 'positions': 'start'}
    module, params = make_model('fame_bert4rec', **options)
    programs = []
    for weight in (0.0, 0.5):
        config = Config(model='fame_bert4rec', balance_weight=weight, **options)
        objective = partial(build.build_objective('fame_bert4rec', config), module)
        programs.append(str(jax.make_jaxpr(objective)(params, make_batch(PACKED), new_key(0))))
    assert len(programs[1]) > len(programs[0])


# What cannot be asked for.


@pytest.mark.parametrize(
    'options, told',
    [
        ({'active_experts': 9}, '--active_experts=9'),
        ({'balance_weight': 0.1}, '--balance_weight=0.1'),
        ({'balance_weight': 0.1, 'active_experts': 8}, '--balance_weight=0.1'),
        ({'attention_dropout': -0.5}, '--attention_dropout=-0.5'),
        ({'attention': 'fused'}, '--attention_dropout=0'),
        ({'routing': 'output'}, 'did you mean outputs'),
    ],
)
def test_flags_that_cannot_be(options, told):
    with pytest.raises(UserError, match=told) as error:
        config_lib.check(Config(**options))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'options',
    [
        {'active_experts': 2, 'balance_weight': 0.01},
        {'attention': 'fused', 'attention_dropout': 0.0},
        {'attention': 'fused', 'dropout': 0.0},
    ],
)
def test_flags_that_can_be(options):
    config_lib.check(Config(**options))

"""Active experts, their attention and their balance, against loops."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import (
    PACKED,
    assert_close,
    compile_objective,
    make_batch,
    make_fame_block,
    make_model,
    new_key,
    quick_jit,
)

from fame_jax.models import experts, layers

# Two positions, one head, four experts.
SHARES = np.array([[[[0.1, 0.4, 0.3, 0.2]], [[0.25, 0.25, 0.25, 0.25]]]], np.float32)


def test_the_largest_shares_are_chosen_and_sum_to_one():
    router_BLHN, pick_BLHAN = experts.top_k_experts(SHARES, 2)
    assert_close(router_BLHN[0, :, 0], [[0, 4 / 7, 3 / 7, 0], [0.5, 0.5, 0, 0]])
    assert np.argmax(pick_BLHAN[0, :, 0], axis=-1).tolist() == [[1, 2], [0, 1]]  # a tie: the first
    assert np.unique(pick_BLHAN).tolist() == [0, 1]


def test_one_active_expert_counts_alone():
    router_BLHN, _ = experts.top_k_experts(SHARES, 1)
    assert router_BLHN[0, :, 0].tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]


def test_gather_and_scatter_move_the_selected_entries():
    rng = np.random.default_rng(0)
    query_BLHNK, weight_BHAQS = rng.normal(size=(1, 2, 1, 4, 3)), rng.normal(size=(1, 1, 2, 2, 5))
    _, pick_BLHAN = experts.top_k_experts(SHARES, 2)
    taken = experts.gather_queries(query_BLHNK.astype(np.float32), pick_BLHAN)
    spread = experts.scatter_weights(weight_BHAQS.astype(np.float32), pick_BLHAN)
    expected = np.zeros((4, 2, 5))
    for position, chosen in enumerate([[1, 2], [0, 1]]):
        assert_close(taken[0, position, 0], query_BLHNK[0, position, 0, chosen])
        for place, n in enumerate(chosen):
            expected[n, position] = weight_BHAQS[0, 0, place, position]
    assert_close(spread[0, 0], expected)


def test_the_gradient_of_a_share_is_zero_for_inactive_experts():
    def first(shares):
        return experts.top_k_experts(shares, 2)[0][0, 0, 0, 1]

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
    dense, params, *inputs, _, _ = make_fame_block(5, routing='inputs')
    expected = gradient(dense, params, *inputs)
    actual = gradient(dense.clone(active_experts=3), params, *inputs)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_gathered_experts_equal_dense_ones(monkeypatch):
    """All of them gathered, in the order of their shares, without the short cut for all."""
    dense, params, *inputs, _, _ = make_fame_block(5, routing='inputs')
    expected = gradient(dense, params, *inputs)
    monkeypatch.setattr(
        type(dense),
        'select_experts',
        lambda self, share: experts.top_k_experts(share, self.num_experts),
    )
    jax.tree.map(assert_close, gradient(dense, params, *inputs), expected)


@pytest.mark.parametrize('routing', ['outputs', 'inputs'])
def test_inactive_experts_have_no_share(routing):
    block, params, *inputs, _, _ = make_fame_block(5, routing=routing, active_experts=2)
    _, parts = forward(block, params, *inputs)
    idle_BLHN = np.asarray(parts['router_BLHN']) == 0
    assert (idle_BLHN.sum(axis=-1) == 1).all()
    attended_BLHN = np.moveaxis(parts['attention_BHNQS'].sum(axis=-1), 3, 1)
    assert_close(attended_BLHN, ~idle_BLHN if routing == 'inputs' else np.ones(idle_BLHN.shape))


def test_only_active_experts_attend_when_routed_by_inputs(monkeypatch):
    seen, attend = [], layers.attend
    monkeypatch.setattr(
        layers, 'attend', lambda query, *rest: seen.append(query.shape) or attend(query, *rest)
    )
    for routing, width in (('outputs', 3), ('inputs', 2)):
        block, params, x_BLD, mask_BLL, *_ = make_fame_block(2, routing=routing, active_experts=2)
        seen.clear()
        jax.eval_shape(partial(block.apply, train=False, last=True), params, x_BLD, mask_BLL)
        assert seen == [(3, 1, 2, width, 4)]


def test_taking_turns_changes_neither_output_nor_gradient():
    """With dropout too: the same entries are dropped, in both passes."""
    block, params, *inputs, _, _ = make_fame_block(5, dropout=0.5)
    expected = gradient(block, params, *inputs, train=True)
    actual = gradient(block.clone(remat=True), params, *inputs, train=True)
    jax.tree.map(assert_close, actual, expected)


@pytest.mark.parametrize('remat', [False, True])
def test_taking_turns_keeps_no_weights_for_the_backward_pass(remat):
    block, params, *inputs, _, _ = make_fame_block(5, dropout=0.5, remat=remat)
    rngs = {'dropout': new_key(0)}

    def total(params):
        return block.apply(params, *inputs, train=True, last=False, rngs=rngs)[0].sum()

    _, pull = jax.eval_shape(partial(jax.vjp, total), params)
    kept = {leaf.shape for leaf in jax.tree.leaves(pull) if leaf.dtype == jnp.float32}
    assert ((4, 2, 3, 5, 5) in kept) == (not remat)


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
    router_BLHN, _ = experts.top_k_experts(share_BLHN.astype(np.float32), 2)
    actual, slope_BLHN = quick_jit(jax.value_and_grad(experts.balance_loss))(
        share_BLHN.astype(np.float32), router_BLHN, real_BL
    )
    assert_close(actual, balance_loop(share_BLHN, np.asarray(router_BLHN), real_BL))
    for b, i, h in np.ndindex(3, 4, 2):  # less of what is chosen often
        chosen_N = (np.asarray(router_BLHN)[real_BL][:, h] > 0).sum(axis=0)
        expected_N = 5 * chosen_N / chosen_N.sum() / real_BL.sum() / 2 * real_BL[b, i]
        assert_close(slope_BLHN[b, i, h], expected_N)


def dense_balance_loop(share_BLHN, real_BL):
    """N sum_n P_n^2 of each head, the mean over heads."""
    places, (num_heads, num_experts) = np.argwhere(real_BL), share_BLHN.shape[-2:]
    total = 0.0
    for h in range(num_heads):
        for n in range(num_experts):
            mean = sum(share_BLHN[b, i, h, n] for b, i in places) / len(places)
            total += num_experts * mean * mean / num_heads
    return total


def test_balance_of_experts_that_are_all_active():
    """By their mean weights; its gradient moves weight from the experts that have much of it."""
    rng = np.random.default_rng(1)
    logit_BLHN = rng.normal(size=(3, 4, 2, 5)) + np.arange(5)
    share_BLHN = (np.exp(logit_BLHN) / np.exp(logit_BLHN).sum(-1, keepdims=True)).astype(np.float32)
    real_BL = rng.random((3, 4)) < 0.6
    loss = partial(experts.balance_loss, all_active=True)
    actual, slope_BLHN = quick_jit(jax.value_and_grad(loss))(share_BLHN, share_BLHN, real_BL)
    assert_close(actual, dense_balance_loop(share_BLHN, real_BL))
    assert (np.diff(slope_BLHN[real_BL].mean(axis=(0, 1))) > 0).all()
    assert not slope_BLHN[~real_BL].any()


def test_the_objective_balances_experts_that_are_all_active():
    plain, params = make_model('fame')
    batch, key = make_batch(PACKED), new_key(0)
    total, weight, _ = compile_objective(plain)(params, batch, key)
    more, _, terms = compile_objective(plain.clone(balance_weight=0.5))(params, batch, key)
    share_BLHN = plain.apply({'params': params}, *batch[:3])[1]['facet_block']['share_BLHN']
    expected = dense_balance_loop(np.asarray(share_BLHN), batch.segments_BL > 0)
    assert_close(terms['balance'], expected)
    assert_close((more - total) / weight, 0.5 * expected)


def test_balance_is_one_of_even_experts_and_n_of_one_alone():
    alone_BLHN = np.broadcast_to(np.eye(4)[0], (2, 3, 1, 4))
    assert_close(experts.balance_loss(alone_BLHN, alone_BLHN, np.ones((2, 3), bool)), 4.0)
    even_BLHN = np.full((1, 4, 1, 4), 0.25)
    turns_BLHN = np.eye(4)[None, :, None]
    assert_close(experts.balance_loss(even_BLHN, turns_BLHN, np.ones((1, 4), bool)), 1.0)


@pytest.mark.parametrize('name, positions', [('fame', 'relative'), ('fame_bert4rec', 'start')])
def test_the_objective_adds_the_weighted_balance(name, positions):
    """The balance of the real positions alone, and its mean among the metrics."""
    options = {'routing': 'inputs', 'active_experts': 2, 'positions': positions}
    plain, params = make_model(name, **options)
    balanced = plain.clone(balance_weight=0.5)
    batch, key = make_batch(PACKED), new_key(0)

    def router(params):
        parts = plain.apply({'params': params}, *batch[:3])[1]['facet_block']
        return parts['share_BLHN'], parts['router_BLHN']

    total, weight, metrics = compile_objective(plain)(params, batch, key)
    more, same, terms = compile_objective(balanced)(params, batch, key)
    assert same == weight and metrics == {} and terms.keys() == {'balance'}
    assert_close((more - total) / weight, 0.5 * terms['balance'])
    if name == 'fame':  # the other masks items at random
        expected = balance_loop(*quick_jit(router)(params), batch.segments_BL > 0)
        assert_close(terms['balance'], expected)

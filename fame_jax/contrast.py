"""FAME+: the facet objective, fitted by turns on frozen text vectors.

Each facet has a pool of its own to draw from, since with items drawn at random most anchors of a
facet such as the brand would have no positive. Everything here runs on the device: drawing, loss
and updates of a whole epoch are one dispatch.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fame_jax import losses
from fame_jax.models.projection import Projection, moving

Array = jax.Array
Tree = Any


class Pool(NamedTuple):
    """What one facet draws from; arrays on the device.

    Fields:
      label_VS: int32, each item's labels, -1 for none; None where every item is its own label.
      member_I: int32, the items of label 0, then those of label 1, ...
      first_C, count_C: int32, where a label's items begin, and how many there are.
    """

    label_VS: Array | None
    member_I: Array
    first_C: Array
    count_C: Array


class Options(NamedTuple):
    """How the objective is fitted; Config has the same names behind `text_`."""

    epochs: int
    learning_rate: float
    alternation: str
    labels_per_step: int  # P
    items_per_label: int  # S
    temperature: float
    dropout: float
    decorrelation: float
    orthogonality: float


def make_pool(label_VS: np.ndarray) -> Pool:
    """A facet's pool.

    Args:
      label_VS: int32 [V + 1, S], distinct in a row, -1 for none; row 0 the padding's.
    """
    item_I, slot_I = np.nonzero(label_VS >= 0)
    label_I = label_VS[item_I, slot_I]
    member_I = item_I[np.argsort(label_I, kind='stable')]
    count_C = np.bincount(label_I)
    arrays = (label_VS, member_I, np.cumsum(count_C) - count_C, count_C)
    return Pool(*(jnp.asarray(array, jnp.int32) for array in arrays))


def make_instances(has_text_V: np.ndarray) -> Pool:
    """The pool of the facet in which an item's one positive is another view of itself."""
    member_I = jnp.asarray(np.flatnonzero(has_text_V), jnp.int32)
    return Pool(None, member_I, jnp.zeros(1, jnp.int32), jnp.full(1, len(member_I), jnp.int32))


def draw(key: Array, pool: Pool, labels: int, items: int) -> tuple[Array, Array, Array]:
    """Draws P labels by the root of their frequency, then S items of each, B = P S.

    Of a facet with fewer labels than P all come, with more items each, so that B is about the same.

    Args:
      key: consumed.
      pool: what to draw from.
      labels: P, distinct. A label of one item is drawn last.
      items: S, with replacement: an item may come twice, and is then not compared to itself.

    Returns:
      item_B, weight_BB and compared_BB, for `losses.supervised_contrastive`. Of instances B / 2
      items are drawn and each comes twice.
    """
    label_key, item_key = jax.random.split(key)
    if pool.label_VS is None:
        at_B = jax.random.randint(item_key, (labels * items // 2,), 0, pool.count_C[0])
        item_B = jnp.tile(pool.member_I[at_B], 2)
        same_BB = item_B[:, None] == item_B[None, :]
        return item_B, same_BB.astype(jnp.float32), jnp.ones_like(same_BB)
    # The greatest of logits with Gumbel noise are a draw without replacement.
    logit_C = jnp.where(pool.count_C > 1, jnp.log(jnp.maximum(pool.count_C, 1)) / 2, -1e9)
    noisy_C = logit_C + jax.random.gumbel(label_key, logit_C.shape)
    drawn = min(labels, len(noisy_C))
    label_P1 = jax.lax.top_k(noisy_C, drawn)[1][:, None]
    shape_PS = (drawn, labels * items // drawn)
    at_PS = jax.random.randint(item_key, shape_PS, 0, pool.count_C[label_P1])
    item_B = pool.member_I[pool.first_C[label_P1] + at_PS].reshape(-1)
    compared_BB = item_B[:, None] != item_B[None, :]
    return item_B, losses.label_overlap(pool.label_VS[item_B]), compared_BB


def facet_loss(
    module: Projection, params: Tree, text_VE: Array, pool: Pool, h: int, key: Array, own: Options
) -> tuple[Array, Array]:
    """The objective of facet h on one batch of its own: (sum, number of anchors)."""
    draw_key, drop_key = jax.random.split(key)
    item_B, weight_BB, compared_BB = draw(draw_key, pool, own.labels_per_step, own.items_per_label)
    text_BE = drop(drop_key, text_VE[item_B], own.dropout)
    head = functools.partial(module.apply, {'params': params}, text_BE, method='head')
    vector_BK = head(h)
    total, count = losses.supervised_contrastive(vector_BK, weight_BB, compared_BB, own.temperature)
    others = [m for m in range(module.num_heads) if m != h]
    penalty = 0.0
    for m in others if own.decorrelation else []:
        penalty += own.decorrelation * decorrelation(vector_BK, jax.lax.stop_gradient(head(m)))
    for m in others if own.orthogonality and module.design == 'shared' else []:
        own_DK, other_DK = (params[f'head_{n}']['kernel'] for n in (h, m))
        product_KK = own_DK.T @ jax.lax.stop_gradient(other_DK)
        penalty += own.orthogonality * jnp.sum(product_KK**2)
    return total + penalty * count, count


def drop(key: Array, text_BE: Array, rate: float) -> Array:
    """A view of text vectors: coordinates dropped, the others scaled up."""
    kept_BE = jax.random.bernoulli(key, 1 - rate, text_BE.shape)
    return jnp.where(kept_BE, text_BE / (1 - rate), 0)


def decorrelation(one_BK: Array, other_BJ: Array) -> Array:
    """The mean squared correlation between the columns of two sets of vectors."""

    def standard(x: Array) -> Array:
        centred = x - x.mean(axis=0, keepdims=True)
        return centred * jax.lax.rsqrt((centred**2).mean(axis=0, keepdims=True) + 1e-8)

    correlation_KJ = standard(one_BK).T @ standard(other_BJ) / len(one_BK)
    return jnp.mean(correlation_KJ**2)


def fit(
    module: Projection,
    params: Tree,
    text_VE: np.ndarray,
    pools: Sequence[Pool],
    key: Array,
    options: Options,
    report: Callable[[int, list[float]], None],
) -> Tree:
    """Fits the heads, head h to facet h, in turns.

    Alternation 'step': a step of facet 0, one of facet 1, ...; 'epoch': all of an epoch's steps of
    facet 0, then those of facet 1, ...; 'sum': no turns, each step descends on all facets' sum. An
    epoch has V / (P S) steps of each facet.

    Args:
      module: with H heads.
      params: its parameters.
      text_VE: [V + 1, E] float32, row 0 the padding's.
      pools: H of them.
      key: consumed.
      options: Adam's rate and the rest. Each head, and the adaptor, has moments of its own, so a
        facet's step leaves the other heads exactly as they are.
      report: called after each epoch with its number, from 1, and each facet's mean loss.

    Returns:
      The fitted parameters.
    """
    optimizer = optax.adam(options.learning_rate)
    heads = range(len(pools))
    rounds = {
        'step': [[[h] for h in heads]],
        'epoch': [[[h]] for h in heads],
        'sum': [[[*heads]]],
    }[options.alternation]
    scans = [make_scan(module, optimizer, turns, options) for turns in rounds]
    moments = {name: optimizer.init(params[name]) for name in params}
    text_VE, pools = jnp.asarray(text_VE), tuple(pools)
    steps = max(1, (len(text_VE) - 1) // (options.labels_per_step * options.items_per_label))
    for epoch in range(options.epochs):
        keys = jax.random.split(jax.random.fold_in(key, epoch), steps)
        loss_H = []
        for scan in scans:
            params, moments, found = scan(params, moments, text_VE, pools, keys)
            loss_H += np.asarray(found).tolist()
        report(epoch + 1, loss_H)
    return params


def make_scan(
    module: Projection,
    optimizer: optax.GradientTransformation,
    turns: Sequence[Sequence[int]],
    options: Options,
) -> Callable[..., tuple[Tree, Tree, Array]]:
    """Many steps in one dispatch; in a step, an update for each turn, on the facets it names."""

    def move(params: Tree, moments: Tree, turn: Sequence[int], key: Array, *data: Any) -> tuple:
        text_VE, pools = data

        def objective(own: Tree) -> tuple[Array, list[Array]]:
            found = [
                facet_loss(
                    module,
                    {**params, **own},
                    text_VE,
                    pools[h],
                    h,
                    jax.random.fold_in(key, h),
                    options,
                )
                for h in turn
            ]
            means = [total / jnp.maximum(count, 1) for total, count in found]
            return sum(means), means

        own = {name: params[name] for name in moving(params, turn)}
        grads, means = jax.grad(objective, has_aux=True)(own)
        params, moments = dict(params), dict(moments)
        for name, grad in grads.items():
            updates, moments[name] = optimizer.update(grad, moments[name], params[name])
            params[name] = optax.apply_updates(params[name], updates)
        return params, moments, means

    @jax.jit
    def scan(params: Tree, moments: Tree, text_VE: Array, pools: Any, keys: Array) -> tuple:
        def step(carry: tuple, key: Array) -> tuple:
            means = []
            for turn in turns:
                *carry, found = move(*carry, turn, key, text_VE, pools)
                means += found
            return tuple(carry), jnp.stack(means)

        (params, moments), per_step = jax.lax.scan(step, (params, moments), keys)
        return params, moments, per_step.mean(axis=0)

    return scan

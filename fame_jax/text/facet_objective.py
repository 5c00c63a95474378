"""FAME+: each head is trained by a contrastive loss over the labels of its own facet.

Each facet samples its own batches: items drawn at random would leave most anchors of a facet such
as the brand without a positive. Sampling, loss and updates of a whole epoch are one dispatch.

This is not `training.loop.fit`, because nothing here is resumed, validated or stopped early, and
each head has an optimizer state of its own.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fame_jax import losses
from fame_jax.errors import UserError
from fame_jax.text.facets import INSTANCE, Facet, shuffle_labels
from fame_jax.text.options import TextOptions
from fame_jax.text.projection import Projection

Array = jax.Array
Tree = Any

TEXT_KEY = 1000  # folded into the seed's key; the other trained stages use small numbers


class Pool(NamedTuple):
    """The items that one facet's batches are drawn from; arrays on the device.

    Fields:
      label_VS: int32 [V + 1, S], each item's labels, padded with -1; None where each item is its
        own label.
      member_I: int32, the items of label 0, then those of label 1, ...
      first_C: int32, the index in member_I of each label's first item.
      count_C: int32, the number of each label's items.
    """

    label_VS: Array | None
    member_I: Array
    first_C: Array
    count_C: Array


def make_pool(label_VS: np.ndarray) -> Pool:
    """The pool of a facet.

    Args:
      label_VS: int32 [V + 1, S], distinct in a row, padded with -1; row 0 is for padding.
    """
    item_I, slot_I = np.nonzero(label_VS >= 0)
    label_I = label_VS[item_I, slot_I]
    member_I = item_I[np.argsort(label_I, kind='stable')]
    count_C = np.bincount(label_I)
    arrays = (label_VS, member_I, np.cumsum(count_C) - count_C, count_C)
    return Pool(*(jnp.asarray(array, jnp.int32) for array in arrays))


def make_instance_pool(has_text_V: np.ndarray) -> Pool:
    """The pool of INSTANCE: an item's only positive is another view of itself."""
    member_I = jnp.asarray(np.flatnonzero(has_text_V), jnp.int32)
    return Pool(None, member_I, jnp.zeros(1, jnp.int32), jnp.full(1, len(member_I), jnp.int32))


def make_pools(
    heads: Sequence[str],
    facets: Sequence[Facet],
    has_text_V: np.ndarray,
    shuffle_seed: int | None = None,
) -> list[Pool]:
    """The pools of H heads, with the items that have a text.

    Args:
      heads: the facet of each head.
      facets: their labels; INSTANCE needs none.
      has_text_V: bool [V + 1].
      shuffle_seed: where given, label sets are permuted among the items, as a control.

    Raises:
      UserError: when no two items with a text share a label of a facet.
    """
    label_VS = {facet.name: facet.label_VS for facet in facets}
    if shuffle_seed is not None:
        label_VS = {name: shuffle_labels(one, shuffle_seed) for name, one in label_VS.items()}
    pools = []
    for name in heads:
        if name == INSTANCE:
            pools.append(make_instance_pool(has_text_V))
            continue
        pool = make_pool(np.where(has_text_V[:, None], label_VS[name], -1))
        if not np.any(pool.count_C > 1):
            raise UserError(
                f'facet {name!r}: no two items with a text share a label; name another facet'
            )
        pools.append(pool)
    return pools


def draw(
    key: Array, pool: Pool, labels_per_step: int, items_per_label: int
) -> tuple[Array, Array, Array]:
    """Draws a batch of B = P S items: P labels, then S items of each.

    Labels are drawn without replacement, with probabilities proportional to the square root of
    their frequency; labels with one item come last. A facet with fewer than P labels gives all of
    them, with more items each, so that B stays about the same. Items of a label are drawn with
    replacement; an item that is drawn twice is not compared to itself.

    For INSTANCE, B / 2 items are drawn, and each is in the batch twice.

    Args:
      key: consumed.
      pool: the facet's items.
      labels_per_step: P.
      items_per_label: S.

    Returns:
      item_B int32, weight_BB float32 and compared_BB bool: `losses.supervised_contrastive` takes
      the latter two.
    """
    label_key, item_key = jax.random.split(key)
    if pool.label_VS is None:
        pairs = labels_per_step * items_per_label // 2
        at_B = jax.random.randint(item_key, (pairs,), 0, pool.count_C[0])
        item_B = jnp.tile(pool.member_I[at_B], 2)
        same_BB = item_B[:, None] == item_B[None, :]
        return item_B, same_BB.astype(jnp.float32), jnp.ones_like(same_BB)
    # The top k of logits plus Gumbel noise are a sample without replacement.
    logit_C = jnp.where(pool.count_C > 1, jnp.log(jnp.maximum(pool.count_C, 1)) / 2, -1e9)
    noisy_C = logit_C + jax.random.gumbel(label_key, logit_C.shape)
    drawn = min(labels_per_step, len(noisy_C))
    label_P1 = jax.lax.top_k(noisy_C, drawn)[1][:, None]
    shape_PS = (drawn, labels_per_step * items_per_label // drawn)
    at_PS = jax.random.randint(item_key, shape_PS, 0, pool.count_C[label_P1])
    item_B = pool.member_I[pool.first_C[label_P1] + at_PS].reshape(-1)
    compared_BB = item_B[:, None] != item_B[None, :]
    return item_B, losses.label_overlap(pool.label_VS[item_B]), compared_BB


def apply_dropout(key: Array, text_BE: Array, rate: float) -> Array:
    """A view of text vectors: coordinates set to zero at random, the others scaled up."""
    kept_BE = jax.random.bernoulli(key, 1 - rate, text_BE.shape)
    return jnp.where(kept_BE, text_BE / (1 - rate), 0)


def facet_loss(
    module: Projection,
    params: Tree,
    text_VE: Array,
    pool: Pool,
    h: int,
    key: Array,
    options: TextOptions,
) -> tuple[Array, Array]:
    """The contrastive loss of head h on one batch of its facet: (sum, number of anchors)."""
    draw_key, drop_key = jax.random.split(key)
    item_B, weight_BB, compared_BB = draw(
        draw_key, pool, options.labels_per_step, options.items_per_label
    )
    text_BE = apply_dropout(drop_key, text_VE[item_B], options.dropout)
    vector_BK = module.apply({'params': params}, text_BE, h, method='head')
    return losses.supervised_contrastive(vector_BK, weight_BB, compared_BB, options.temperature)


def fit_heads(
    text_VE: np.ndarray,
    heads: Sequence[str],
    facets: Sequence[Facet],
    *,
    width: int,
    options: TextOptions,
    seed: int,
    report: Callable[[int, list[float]], None] = lambda epoch, loss_H: None,
) -> tuple[Projection, Tree, Tree]:
    """Trains a head for each facet.

    Args:
      text_VE: float32 [V + 1, E], as `vectors.standardize` gives them; row 0 is for padding.
      heads: the facet of each head.
      facets: the facets' labels.
      width: D, columns of an item's vector; a multiple of the number of heads.
      options: of the objective.
      seed: of initialisation and sampling.
      report: called after each epoch with its number, from 1, and each head's mean loss.

    Returns:
      The projection, its parameters at initialisation, and its trained parameters.

    Raises:
      UserError: when a facet has no two items to bring together.
    """
    module = Projection(len(heads), width, options.inner_width)
    key = jax.random.fold_in(jax.random.key(seed), TEXT_KEY)
    params = module.init(jax.random.fold_in(key, 0), text_VE[:1])['params']
    pools = make_pools(
        heads, facets, text_VE.any(axis=1), seed if options.shuffled_labels else None
    )
    fitted = fit(module, params, text_VE, pools, jax.random.fold_in(key, 1), options, report)
    return module, params, fitted


def fit(
    module: Projection,
    params: Tree,
    text_VE: np.ndarray,
    pools: Sequence[Pool],
    key: Array,
    options: TextOptions,
    report: Callable[[int, list[float]], None],
) -> Tree:
    """Trains head h on pool h; an epoch has V / (P S) steps for each head.

    Args:
      module: with H heads.
      params: its parameters.
      text_VE: float32 [V + 1, E], row 0 for padding.
      pools: H of them.
      key: consumed.
      options: of the objective; `alternation` orders the steps.
      report: called after each epoch with its number, from 1, and each head's mean loss.

    Returns:
      The trained parameters.
    """
    optimizer = optax.adam(options.learning_rate)
    heads = range(len(pools))
    # An entry of an order is a scan over the epoch; it lists the updates of a step, and an update
    # lists its heads.
    orders = {
        'step': [[[h] for h in heads]],
        'epoch': [[[h]] for h in heads],
        'sum': [[[*heads]]],
    }
    scans = [make_scan(module, optimizer, turns, options) for turns in orders[options.alternation]]
    moments = {name: optimizer.init(params[name]) for name in params}
    text_VE, pools = jnp.asarray(text_VE), tuple(pools)
    steps = max(1, (len(text_VE) - 1) // (options.labels_per_step * options.items_per_label))
    for epoch in range(options.epochs):
        keys = jax.random.split(jax.random.fold_in(key, epoch), steps)
        loss_H = []
        for scan in scans:
            params, moments, means = scan(params, moments, text_VE, pools, keys)
            loss_H += np.asarray(means).tolist()
        report(epoch + 1, loss_H)
    return params


def make_scan(
    module: Projection,
    optimizer: optax.GradientTransformation,
    turns: Sequence[Sequence[int]],
    options: TextOptions,
) -> Callable[[Tree, Tree, Array, tuple[Pool, ...], Array], tuple[Tree, Tree, Array]]:
    """Compiles a scan over steps.

    Args:
      module: with H heads.
      optimizer: has a state for each head, so that an update leaves the other heads unchanged.
      turns: the updates of a step; each is on the summed losses of its heads.
      options: of the objective.

    Returns:
      (params, moments, text_VE, pools, a key for each step) -> (params, moments, mean losses in
      the order of `turns`).
    """

    def update(
        params: Tree, moments: Tree, heads: Sequence[int], key: Array, text_VE: Array, pools: Any
    ) -> tuple[Tree, Tree, list[Array]]:
        def objective(own: Tree) -> tuple[Array, list[Array]]:
            tree, means = {**params, **own}, []
            for h in heads:
                head_key = jax.random.fold_in(key, h)
                total, count = facet_loss(module, tree, text_VE, pools[h], h, head_key, options)
                means.append(total / jnp.maximum(count, 1))
            return sum(means), means

        own = {f'head_{h}': params[f'head_{h}'] for h in heads}
        grads, means = jax.grad(objective, has_aux=True)(own)
        params, moments = dict(params), dict(moments)
        for name, grad in grads.items():
            updates, moments[name] = optimizer.update(grad, moments[name], params[name])
            params[name] = optax.apply_updates(params[name], updates)
        return params, moments, means

    @jax.jit
    def scan(params: Tree, moments: Tree, text_VE: Array, pools: Any, keys: Array) -> tuple:
        def step(carry: tuple, key: Array) -> tuple:
            params, moments = carry
            means = []
            for heads in turns:
                params, moments, some = update(params, moments, heads, key, text_VE, pools)
                means += some
            return (params, moments), jnp.stack(means)

        (params, moments), means_per_step = jax.lax.scan(step, (params, moments), keys)
        return params, moments, means_per_step.mean(axis=0)

    return scan

"""What a model is trained on: the loss over a batch that the loop differentiates."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from fame_jax import losses
from fame_jax.batch import Batch

Array = jax.Array


def next_item(
    module: nn.Module,
    params: dict,
    batch: Batch,
    key: Array,
    *,
    loss: str,
    num_negatives: int,
    chunk_tokens: int,
    chunk_items: int,
    negatives: str = 'uniform',
    popularity_V: Array | None = None,
) -> tuple[Array, Array]:
    """The loss of predicting the next item at every position with a weight.

    Where only some rows of the item table are wanted at a time, only they are made vectors.

    Args:
      module: an `ItemModel`.
      params: its parameters.
      batch: fields [B, L].
      key: consumed, for dropout and negatives.
      loss: 'ce' (eq. 18), 'bce' or 'sampled'.
      num_negatives: for 'bce' per position, for 'sampled' per step.
      chunk_tokens: for 'ce', tokens at a time; 0: all.
      chunk_items: for 'ce', items at a time; 0: all.
      negatives: for 'sampled', 'uniform' or 'popularity'.
      popularity_V: for 'popularity', what is drawn by, of `losses.cumulate`. At millions of items
        it is to be an argument of the program and not a constant in it.

    Returns:
      The weighted sum over positions and the sum of weights, float32 scalars.
    """
    dropout_key, negative_key = jax.random.split(key)
    by_rows = module.has_plain_items() and (loss != 'ce' or chunk_items > 0)
    query_BLD, item_VD = module.apply(
        {'params': params},
        batch.tokens_BL,
        batch.positions_BL,
        batch.segments_BL,
        train=True,
        rngs={'dropout': dropout_key},
        method='query_and_rows' if by_rows else 'query_and_items',
    )
    return item_loss(
        query_BLD,
        item_VD,
        batch,
        negative_key,
        loss=loss,
        num_negatives=num_negatives,
        chunk_tokens=chunk_tokens,
        chunk_items=chunk_items,
        negatives=negatives,
        popularity_V=popularity_V,
        prepare=module.vectors_of if by_rows else losses.as_they_are,
        num_items=module.num_items,
        mesh=module.mesh,
    )


def item_loss(
    query_BLD: Array,
    item_VD: Array,
    batch: Batch,
    key: Array,
    *,
    loss: str,
    num_negatives: int,
    chunk_tokens: int,
    chunk_items: int,
    negatives: str = 'uniform',
    popularity_V: Array | None = None,
    prepare: Callable[[Array], Array] = losses.as_they_are,
    num_items: int,
    mesh: jax.sharding.Mesh | None,
) -> tuple[Array, Array]:
    """The loss of a batch's targets, given a query per position; otherwise as `next_item`.

    `prepare` makes vectors of any rows of `item_VD`, as the losses have it; `mesh` is the devices
    that share those rows, of which there may then be more than V + 1.
    """
    query_TD = query_BLD.reshape(-1, query_BLD.shape[-1])
    target_T, weight_T = batch.targets_BL.reshape(-1), batch.weights_BL.reshape(-1)
    if loss == 'ce' and mesh is not None:
        return losses.divided_cross_entropy(
            query_TD,
            item_VD,
            target_T,
            weight_T,
            mesh=mesh,
            num_items=num_items,
            chunk_tokens=chunk_tokens,
            chunk_items=chunk_items,
            prepare=prepare,
        )
    if loss == 'ce' and not chunk_tokens and not chunk_items:
        return losses.cross_entropy(query_TD, prepare(item_VD), target_T, weight_T)
    if loss == 'ce':
        return losses.chunked_cross_entropy(
            query_TD,
            item_VD,
            target_T,
            weight_T,
            chunk_tokens=chunk_tokens,
            chunk_items=chunk_items,
            prepare=prepare,
        )
    if loss == 'sampled':
        shape_R, log_q_R = (num_negatives,), None
        if negatives == 'popularity':
            negative_R, log_q_R = losses.draw_popular(key, shape_R, popularity_V)
        else:
            negative_R = losses.draw_negatives(key, shape_R, num_items)
        return losses.sampled_cross_entropy(
            query_TD, item_VD, target_T, negative_R, weight_T, log_q=log_q_R, prepare=prepare
        )
    shape_BLR = (*batch.tokens_BL.shape, num_negatives)
    negative_BLR = losses.draw_negatives(key, shape_BLR, num_items)
    valid_TR = ~in_history(batch, negative_BLR).reshape(-1, num_negatives)
    negative_TR = negative_BLR.reshape(-1, num_negatives)
    return losses.binary_cross_entropy(
        query_TD,
        item_VD,
        target_T,
        negative_TR,
        weight_T,
        valid_TR.astype(jnp.float32),
        prepare=prepare,
    )


def in_history(batch: Batch, item_BLR: Array) -> Array:
    """Whether items drawn for a position are anywhere in that position's history; bool [B, L, R].

    SASRec draws its negatives outside the whole training history, the target included.
    """
    same_BLS = batch.segments_BL[:, :, None] == batch.segments_BL[:, None, :]
    found_BLR = jnp.zeros(item_BLR.shape, bool)
    for known_BL in (batch.tokens_BL, batch.targets_BL):
        equal_BLSR = known_BL[:, None, :, None] == item_BLR[:, :, None, :]
        found_BLR |= jnp.any(equal_BLSR & same_BLS[..., None], axis=2)
    return found_BLR

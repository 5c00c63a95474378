"""The loss of predicting the target at every position, for every kind of loss."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fame_jax import losses
from fame_jax.batch import Batch
from fame_jax.losses import LossOptions

Array = jax.Array

MAX_LOGITS = 2**28  # logits that an accelerator computes at a time: 1 GiB of float32


def inputs(batch: Batch) -> tuple[Array, Array, Array]:
    """The three fields of a batch that a model reads: tokens, positions and segments, [B, L]."""
    return batch.tokens_BL, batch.positions_BL, batch.segments_BL


def next_item_loss(
    module: nn.Module, params: dict, batch: Batch, key: Array, loss: LossOptions
) -> tuple[Array, Array, Any]:
    """The loss of predicting the next item at every position that has a weight.

    Args:
      module: an `ItemModel`.
      params: its parameters.
      batch: fields [B, L].
      key: consumed, for dropout and negatives.
      loss: which loss; see `LossOptions`.

    Returns:
      The weighted sum over positions and the sum of weights, float32 scalars, and the model's
      intermediates.
    """
    dropout_key, negative_key = jax.random.split(key)
    options = {'train': True, 'rngs': {'dropout': dropout_key}}
    if module.row_wise_items:
        query_BLD, intermediates = module.apply({'params': params}, *inputs(batch), **options)
        item_VD, transform = params['item_table'], module.item_transform
    else:
        query_BLD, item_VD, intermediates = module.apply(
            {'params': params}, *inputs(batch), method='forward', **options
        )
        transform = losses.identity
    total, weight = target_loss(
        module, query_BLD, item_VD, batch, negative_key, loss, item_transform=transform
    )
    return total, weight, intermediates


def target_loss(
    module: nn.Module,
    query_BLD: Array,
    item_VD: Array,
    batch: Batch,
    key: Array,
    loss: LossOptions,
    *,
    item_transform: Callable[[Array], Array],
) -> tuple[Array, Array]:
    """The loss of a batch's targets, given a query for each position.

    Args:
      module: an `ItemModel`.
      query_BLD: queries.
      item_VD: rows of the item table or item vectors, V + 1 or, on several devices, a few more.
      batch: fields [B, L].
      key: consumed, for negatives.
      loss: which loss.
      item_transform: rows of `item_VD` -> item vectors; the identity for item vectors.

    Returns:
      The weighted sum over positions and the sum of weights, float32 scalars.
    """
    query_TD = query_BLD.reshape(-1, query_BLD.shape[-1])
    target_T, share_TF = labels(batch, loss)
    weight_T = batch.weights_BL.reshape(-1)
    if loss.loss == 'ce':
        log_extra_T = None
        if not is_equal(loss.seen_weight, 1):
            log_extra_T = losses.log_seen(
                query_BLD,
                item_VD[batch.tokens_BL],
                batch.tokens_BL,
                batch.segments_BL,
                batch.targets_BL,
                loss.seen_weight,
                item_transform,
            ).reshape(-1)
        return catalogue_loss(
            query_TD,
            item_VD,
            target_T,
            weight_T,
            loss=loss,
            num_items=module.num_items,
            mesh=module.mesh,
            share_TF=share_TF,
            log_extra_T=log_extra_T,
            item_transform=item_transform,
        )
    if loss.loss == 'sampled':
        shape_R, log_q_R = (loss.num_negatives,), None
        if loss.negatives == 'popularity':
            negative_R, log_q_R = losses.draw_popular(key, shape_R, loss.popularity_V)
        else:
            negative_R = losses.draw_negatives(key, shape_R, module.num_items)
        return losses.sampled_cross_entropy(
            query_TD,
            item_VD,
            target_T,
            negative_R,
            weight_T,
            log_q=log_q_R,
            share_TF=share_TF,
            item_transform=item_transform,
        )
    shape_BLR = (*batch.tokens_BL.shape, loss.num_negatives)
    negative_BLR = losses.draw_negatives(key, shape_BLR, module.num_items)
    valid_TR = ~in_history(batch, negative_BLR).reshape(-1, loss.num_negatives)
    negative_TR = negative_BLR.reshape(-1, loss.num_negatives)
    return losses.binary_cross_entropy(
        query_TD,
        item_VD,
        target_T,
        negative_TR,
        weight_T,
        valid_TR.astype(jnp.float32),
        item_transform=item_transform,
        share_TF=share_TF,
    )


def labels(batch: Batch, loss: LossOptions) -> tuple[Array, Array | None]:
    """The targets of all positions, [T], and None; or soft labels, targets and shares [T, F]."""
    if len(loss.future_targets) == 1:
        return batch.targets_BL.reshape(-1), None
    target_BLF, share_BLF = losses.future_targets(
        batch.targets_BL, batch.segments_BL, loss.future_targets
    )
    number = target_BLF.shape[-1]
    return target_BLF.reshape(-1, number), share_BLF.reshape(-1, number)


def catalogue_loss(
    query_TD: Array,
    item_VD: Array,
    target_T: Array,
    weight_T: Array,
    *,
    loss: LossOptions,
    num_items: int,
    mesh: jax.sharding.Mesh | None = None,
    num_tokens: Array | None = None,
    share_TF: Array | None = None,
    log_extra_T: Array | None = None,
    item_transform: Callable[[Array], Array] = losses.identity,
) -> tuple[Array, Array]:
    """Cross-entropy of the softmax over the whole catalogue, on one device or on a mesh.

    Args:
      query_TD: a query for each token.
      item_VD: as in `target_loss`.
      target_T: int32 item ids.
      weight_T: float32.
      loss: the sizes of the chunks.
      num_items: V.
      mesh: the devices over which the rows of `item_VD` are split; None: they are not.
      num_tokens: int32 scalar; the weights of tokens from it on are 0, and their chunks are
        skipped. None: all count. Not with a mesh.
      share_TF: shares of soft labels, whose targets are [T, F]; None: one target a token.
      log_extra_T: the logarithm of a further term of the softmax's sum; None: there is none.
      item_transform: as in `target_loss`.

    Returns:
      The weighted sum and the sum of weights, float32 scalars.
    """
    return losses.cross_entropy(
        query_TD,
        item_VD,
        target_T,
        weight_T,
        chunk_tokens=chunk_tokens(loss, num_items),
        chunk_items=loss.chunk_items,
        mesh=mesh,
        num_items=num_items,
        num_tokens=num_tokens,
        share_TF=share_TF,
        log_extra_T=log_extra_T,
        item_transform=item_transform,
    )


def chunk_tokens(loss: LossOptions, num_items: int) -> int:
    """Tokens of a chunk: the given number, or a default for the device and the catalogue."""
    if loss.chunk_tokens >= 0:
        return loss.chunk_tokens
    return default_chunk_tokens(loss.chunk_items or num_items, jax.default_backend())


def default_chunk_tokens(num_items: int, backend: str) -> int:
    """Tokens of a chunk, given the items that are scored at a time.

    On a CPU, 128 was the fastest in measurements. On an accelerator a chunk launches a dozen
    kernels whatever its size, so chunks are as large as `MAX_LOGITS` allows.
    """
    return 128 if backend == 'cpu' else max(1, MAX_LOGITS // num_items)


def in_history(batch: Batch, item_BLR: Array) -> Array:
    """Whether items drawn for a position occur anywhere in its history; bool [B, L, R].

    SASRec draws negatives outside the whole training history, the targets included.
    """
    same_BLS = batch.segments_BL[:, :, None] == batch.segments_BL[:, None, :]
    inside_BLR = jnp.zeros(item_BLR.shape, bool)
    for history_BL in (batch.tokens_BL, batch.targets_BL):
        equal_BLSR = history_BL[:, None, :, None] == item_BLR[:, :, None, :]
        inside_BLR |= jnp.any(equal_BLSR & same_BLS[..., None], axis=2)
    return inside_BLR


def is_equal(value: float | Array, number: float) -> bool:
    """Whether a setting has the value that switches a term off; a traced setting has not."""
    return isinstance(value, float | int) and value == number


def add_term(
    total: Array, weight: Array, term: tuple[Array, Array], term_weight: float
) -> tuple[Array, Array]:
    """A loss sum to which the mean of another term is added.

    Args:
      total: the weighted sum of the loss.
      weight: its sum of weights; the sum returned has the same one.
      term: the sum and the count of the other term.
      term_weight: factor of its mean.

    Returns:
      The new sum, and the term's mean; float32 scalars.
    """
    mean = term[0] / jnp.maximum(term[1], 1)
    return total + term_weight * mean * weight, mean

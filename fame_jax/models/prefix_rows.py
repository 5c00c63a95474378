"""The loss of models for which a row is one prefix, with one query for the whole row."""

from typing import Any

import flax.linen as nn
import jax

from fame_jax.batch import Batch
from fame_jax.losses import LossOptions
from fame_jax.models.objective import inputs, target_loss

Array = jax.Array


def last_item_loss(
    module: nn.Module, params: dict, batch: Batch, key: Array, loss: LossOptions
) -> tuple[Array, Array, Any]:
    """The loss of predicting each row's target, which is in the last column.

    Args:
      module: an `ItemModel` with one query a row, whose `row_wise_items` is True.
      params: its parameters.
      batch: fields [B, L], rows of the layout 'prefixes'.
      key: consumed, for dropout and negatives.
      loss: 'ce' or 'sampled'. With 'bce' negatives could be items of the prefix.

    Returns:
      The weighted sum over rows and the sum of weights, float32 scalars, and the model's
      intermediates.
    """
    dropout_key, negative_key = jax.random.split(key)
    query_B1D, intermediates = module.apply(
        {'params': params}, *inputs(batch), train=True, last=True, rngs={'dropout': dropout_key}
    )
    total, weight = target_loss(
        module,
        query_B1D,
        params['item_table'],
        Batch(*(field_BL[:, -1:] for field_BL in batch)),
        negative_key,
        loss,
        item_transform=module.item_transform,
    )
    return total, weight, intermediates

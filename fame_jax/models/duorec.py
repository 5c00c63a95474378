"""DuoRec (Qiu et al., WSDM 2022, arXiv 2110.05730): SASRec, and contrast of like prefixes.

    h = f(s) and h' = f(s) with another dropout; h_s = f(s+), s+ another prefix with s's target
    L = L_item(h) + lambda NT-Xent(h', h_s)

As in the authors' code with `contrast='us_x'`, what their script runs: inner product, temperature
1, lambda 0.1, all other views of the step as negatives, those with the same target too. They give
every prefix its s+; here one prefix of each window a step has one, drawn as data/companions.py
says, and the item's loss is at every position.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fame_jax import losses
from fame_jax.batch import PairedBatch
from fame_jax.models import objective, views
from fame_jax.models.sasrec import SASRec

Array = jax.Array


class DuoRec(SASRec):
    """SASRec; what is new is what it is trained on."""


def contrast_pairs(
    module: nn.Module,
    params: dict,
    batch: PairedBatch,
    key: Array,
    *,
    contrast_weight: float,
    contrast_temperature: float,
    contrast_anchors: int,
    **item_options: Any,
) -> tuple[Array, Array]:
    """The loss of the next item, and the weighted contrast of prefixes with their companions.

    Args:
      module: a SASRec.
      params: its parameters.
      batch: fields [B, L].
      key: consumed, for dropout and negatives.
      contrast_weight: lambda.
      contrast_temperature: > 0.
      contrast_anchors: prefixes that are contrasted at most, the first of the companion rows.
      **item_options: those of `objective.next_item`.

    Returns:
      The sum and the count of `objective.next_item`, the contrast's mean in the sum.
    """
    item_key, dropout_key = jax.random.split(key)
    loss = objective.next_item(module, params, batch, item_key, **item_options)
    own = batch.tokens_BL, batch.positions_BL, batch.segments_BL
    pair = batch.pair_tokens_BL, batch.pair_positions_BL, batch.pair_segments_BL
    anchor_T = batch.anchor_BL.reshape(-1)
    size = min(contrast_anchors, anchor_T.size)
    (end_A,) = jnp.nonzero(anchor_T >= 0, size=size, fill_value=-1)
    h_TD, pair_TD = views.encode(module, params, dropout_key, own, pair)
    term = losses.two_view_contrast(
        h_TD[anchor_T[end_A]], pair_TD[end_A], end_A >= 0, contrast_temperature
    )
    return views.add_term(loss, term, contrast_weight)

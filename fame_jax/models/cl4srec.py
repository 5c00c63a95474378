"""CL4SRec (Xie et al., ICDE 2022, arXiv 2010.14395): SASRec, and contrast of augmented histories.

    L = L_item + lambda L_contrast                                    (eq. 10)
    L_contrast: two views of each history by two different operators of crop, mask and reorder
    (eqs. 4-6), NT-Xent of their last positions, all other views of the step as negatives (eq. 3)

There is no code of the authors; shares and weight are those of the DuoRec authors' version (crop
0.6, mask 0.3, reorder 0.6, lambda 0.1, temperature 1, inner product). It and the paper augment
every prefix of a history as a row of its own; here each window of a history is augmented once a
step, and the views are compared at its end.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax

from fame_jax import losses
from fame_jax.batch import Batch
from fame_jax.models import objective, views
from fame_jax.models.sasrec import MaskedSASRec

Array = jax.Array


class CL4SRec(MaskedSASRec):
    """SASRec that can read masked items; what is new is what it is trained on."""


def contrast_views(
    module: nn.Module,
    params: dict,
    batch: Batch,
    key: Array,
    *,
    crop_share: float,
    mask_share: float,
    reorder_share: float,
    contrast_weight: float,
    contrast_temperature: float,
    contrast_anchors: int,
    **item_options: Any,
) -> tuple[Array, Array]:
    """The loss of the next item, and the weighted contrast of two views of each history.

    Args:
      module: a MaskedSASRec.
      params: its parameters.
      batch: fields [B, L].
      key: consumed, for views, dropout and negatives.
      crop_share: of a history that a crop keeps.
      mask_share: of its items that are masked.
      reorder_share: of it that is shuffled.
      contrast_weight: lambda.
      contrast_temperature: > 0.
      contrast_anchors: histories that are contrasted at most, the first of the step.
      **item_options: those of `objective.next_item`.

    Returns:
      The sum and the count of `objective.next_item`, the contrast's mean in the sum.
    """
    item_key, view_key, dropout_key = jax.random.split(key, 3)
    loss = objective.next_item(module, params, batch, item_key, **item_options)
    operators = [
        partial(views.crop, share=crop_share),
        partial(views.mask, share=mask_share, mask_id=module.mask_id),
        partial(views.reorder, share=reorder_share),
    ]
    # A row that holds anything holds the end of a history, so later rows are not asked for.
    fields = tuple(field[:contrast_anchors] for field in batch[:3])
    pair = views.two_views(view_key, fields, operators)
    # A view keeps every history, so both find the same ones, in the same order.
    (one_A, real_A), (other_A, _) = (views.ends(view[2], contrast_anchors) for view in pair)
    one_TD, other_TD = views.encode(module, params, dropout_key, *pair)
    term = losses.two_view_contrast(one_TD[one_A], other_TD[other_A], real_A, contrast_temperature)
    return views.add_term(loss, term, contrast_weight)

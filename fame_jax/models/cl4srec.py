"""CL4SRec (Xie et al., ICDE 2022, arXiv 2010.14395): SASRec with contrast of augmented histories.

    L = L_item + lambda L_contrast                                    (eq. 10)
    L_contrast: two views of each history by two different operators of crop, mask and reorder
    (eqs. 4-6), NT-Xent of their last positions, all other views of the step as negatives (eq. 3)

The authors have published no code; the defaults are those of the DuoRec authors' version (crop
0.6, mask 0.3, reorder 0.6, lambda 0.1, temperature 1, inner product). That code and the paper
augment every prefix of a history as a row of its own; here each window of a history is augmented
once a step, and the views are compared at their last items.
"""

from functools import partial
from typing import Annotated, ClassVar

import flax.linen as nn
import jax

from fame_jax import losses
from fame_jax.batch import Batch
from fame_jax.losses import LossOptions
from fame_jax.models import augmentations
from fame_jax.models.objective import add_term, inputs
from fame_jax.models.options import Range, Share, Temperature, Weight
from fame_jax.models.sasrec import MaskedSASRec

Array = jax.Array


class CL4SRec(MaskedSASRec):
    """SASRec with [MASK], trained with a contrast of two views of each history.

    Attributes:
      crop_share: share of a history that a crop keeps.
      mask_share: share of its items that are masked.
      reorder_share: share of it that is shuffled.
      contrast_weight: lambda.
      contrast_temperature: of the contrast.
      contrast_anchors: the most histories that are contrasted in a step; the first ones are taken.
    """

    crop_share: Share = 0.6
    mask_share: Share = 0.3
    reorder_share: Share = 0.6
    contrast_weight: Weight = 0.1
    contrast_temperature: Temperature = 1.0
    contrast_anchors: Annotated[int, Range(2, 1_000_000)] = 128

    title: ClassVar[str] = 'CL4SRec'

    @nn.nowrap
    def objective(
        self, params: dict, batch: Batch, key: Array, loss: LossOptions
    ) -> tuple[Array, Array, dict[str, Array]]:
        """The loss of the next item plus the weighted contrast of two views of each history.

        Arguments and results are those of `ItemModel.objective`; the metric is 'contrast'.
        """
        item_key, view_key, dropout_key = jax.random.split(key, 3)
        total, weight, _ = self.item_loss(params, batch, item_key, loss)
        operators = [
            partial(augmentations.crop, share=self.crop_share),
            partial(augmentations.mask, share=self.mask_share, mask_id=self.mask_id),
            partial(augmentations.reorder, share=self.reorder_share),
        ]
        # Every row but padding has the end of a history, so the first rows have enough of them.
        fields = tuple(field[: self.contrast_anchors] for field in inputs(batch))
        views = augmentations.two_views(view_key, fields, operators)
        # A view keeps every history, so the ends of both views are in the same order.
        (one_A, real_A), (other_A, _) = (
            augmentations.ends(segments_BL, self.contrast_anchors) for *_, segments_BL in views
        )
        one_TD, other_TD = augmentations.encode(self, params, dropout_key, *views)
        term = losses.two_view_contrast(
            one_TD[one_A], other_TD[other_A], real_A, self.contrast_temperature
        )
        total, contrast = add_term(total, weight, term, self.contrast_weight)
        return total, weight, {'contrast': contrast}

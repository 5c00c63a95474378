"""DuoRec (Qiu et al., WSDM 2022, arXiv 2110.05730): SASRec with contrast of similar prefixes.

    h = f(s) and h' = f(s) with another dropout; h_s = f(s+), s+ another prefix with s's target
    L = L_item(h) + lambda NT-Xent(h', h_s)

As in the authors' code with `contrast='us_x'`, the setting of their script: inner product,
temperature 1, lambda 0.1, all other views of the step as negatives, those with the same target too.
They give every prefix its s+. Here one prefix of each window has one in a step, drawn as
data/same_target_pairs.py describes, and the loss of the item is at every position.
"""

from typing import Annotated, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from fame_jax import losses
from fame_jax.batch import PairedBatch
from fame_jax.losses import LossOptions
from fame_jax.models import augmentations
from fame_jax.models.objective import add_term, inputs
from fame_jax.models.options import Range, Temperature, Weight
from fame_jax.models.sasrec import SASRec

Array = jax.Array


class DuoRec(SASRec):
    """SASRec, trained with a contrast of prefixes that have the same target.

    Attributes:
      contrast_weight: lambda.
      contrast_temperature: of the contrast.
      contrast_anchors: the most prefixes that are contrasted in a step; the first ones are taken.
    """

    contrast_weight: Weight = 0.1
    contrast_temperature: Temperature = 1.0
    contrast_anchors: Annotated[int, Range(2, 1_000_000)] = 128

    title: ClassVar[str] = 'DuoRec'
    row_layout: ClassVar[str] = 'pairs'

    @nn.nowrap
    def objective(
        self, params: dict, batch: PairedBatch, key: Array, loss: LossOptions
    ) -> tuple[Array, Array, dict[str, Array]]:
        """The loss of the next item plus the weighted contrast of prefixes with their pairs.

        Arguments and results are those of `ItemModel.objective`; the metric is 'contrast'.
        """
        item_key, dropout_key = jax.random.split(key)
        total, weight, _ = self.item_loss(params, batch, item_key, loss)
        pairs = batch.pair_tokens_BL, batch.pair_positions_BL, batch.pair_segments_BL
        anchor_T = batch.anchor_BL.reshape(-1)
        size = min(self.contrast_anchors, anchor_T.size)
        (end_A,) = jnp.nonzero(anchor_T >= 0, size=size, fill_value=-1)
        h_TD, pair_TD = augmentations.encode(self, params, dropout_key, inputs(batch), pairs)
        term = losses.two_view_contrast(
            h_TD[anchor_T[end_A]], pair_TD[end_A], end_A >= 0, self.contrast_temperature
        )
        total, contrast = add_term(total, weight, term, self.contrast_weight)
        return total, weight, {'contrast': contrast}

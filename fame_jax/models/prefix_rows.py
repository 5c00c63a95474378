"""What models share for which a row is one prefix, with one query for the whole row."""

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax

from fame_jax.batch import Batch
from fame_jax.losses import LossOptions
from fame_jax.models.objective import inputs, target_loss

Array = jax.Array


class PrefixRows(nn.Module):
    """The form of a model in which a row is one prefix, whose positions may use all its items.

    A subclass inherits from this class and after it from the model's causal form. The recipe is
    that of BSARec's code and of TV-Rec's run.sh for Beauty, the latter's for Sports too: batches of
    256 prefixes, Adam at 5e-4, at most 200 epochs, patience 10.
    """

    row_layout: ClassVar[str] = 'prefixes'
    causal: ClassVar[bool] = False
    losses: ClassVar[tuple[str, ...]] = ('ce', 'sampled')
    recipe: ClassVar[Mapping[str, Any]] = {
        'rows_per_step': 256,
        'learning_rate': 5e-4,
        'pretrain_epochs': 200,
        'patience': 10,
    }

    def __call__(
        self,
        tokens_BL: Array,
        positions_BL: Array,
        segments_BL: Array,
        *,
        train: bool = False,
        last: bool = False,
    ) -> tuple[Array, dict[str, dict[str, Array]]]:
        """As the causal form, for rows that end with their only prefix: always with `last`.

        Returns:
          query_B1D, and each block's intermediates by name.
        """
        del last
        return super().__call__(tokens_BL, positions_BL, segments_BL, train=train, last=True)

    @nn.nowrap
    def item_loss(
        self, params: dict, batch: Batch, key: Array, loss: LossOptions
    ) -> tuple[Array, Array, Any]:
        """The loss of predicting each row's target, which is in the last column.

        Args:
          params: the model's parameters.
          batch: fields [B, L], rows of the layout 'prefixes'.
          key: consumed, for dropout and negatives.
          loss: 'ce' or 'sampled'. With 'bce' negatives could be items of the prefix.

        Returns:
          The weighted sum over rows and the sum of weights, float32 scalars, and the model's
          intermediates.
        """
        dropout_key, negative_key = jax.random.split(key)
        query_B1D, intermediates = self.apply(
            {'params': params}, *inputs(batch), train=True, last=True, rngs={'dropout': dropout_key}
        )
        total, weight = target_loss(
            self,
            query_B1D,
            params['item_table'],
            Batch(*(field_BL[:, -1:] for field_BL in batch)),
            negative_key,
            loss,
            item_transform=self.item_transform,
        )
        return total, weight, intermediates

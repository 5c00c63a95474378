"""Models without layers: the query is the last item's vector, or the mean of the history's vectors.

With x_i = drop(E[s_i]) and a cosine or an inner product as the score of query and item:

    last item            h_t = x_t
    mean of the history  h_t = (x_1 + .. + x_t) / t

Both have the item table and nothing else as parameters, and are trained as SASRec is. What SASRec
or FAME gains over them is the gain of its layers. The second query is m_s of STAMP (Liu et al., KDD
2018, eq. 1) without the attention and the dense layers that follow there; the first is Markovian.

A query is an item vector or a mean of item vectors, so the items of the history are near it. Where
no user has an item twice, unmasked figures are therefore lower than masked ones, as CORE's are.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp

from fame_jax.models import layers
from fame_jax.models.item_model import ItemModel
from fame_jax.models.options import Rate

Array = jax.Array


class PooledHistory(ItemModel):
    """A query for each position, pooled from the item vectors of its prefix without parameters.

    A subclass defines `pool`.

    Attributes:
      dropout: rate, on item embeddings; SASRec's here.
    """

    dropout: Rate = 0.5

    shardable_items: ClassVar[bool] = True

    def setup(self) -> None:
        super().setup()
        self.input_dropout = layers.Dropout(self.dropout)

    def __call__(
        self,
        tokens_BL: Array,
        positions_BL: Array,
        segments_BL: Array,
        *,
        train: bool = False,
        last: bool = False,
    ) -> tuple[Array, dict[str, dict[str, Array]]]:
        """Encodes histories.

        Args:
          tokens_BL: int32 items, 0 for padding.
          positions_BL: not used; the order follows the columns.
          segments_BL: int32, which history of the row, 0 for padding.
          train: whether to apply dropout; needs the rng 'dropout'.
          last: compute the last column alone, for rows that end with their history.

        Returns:
          query_BLD, or [B, 1, D] if `last`, and the pooled vectors of the same columns,
          {'pool': {'pooled_BQD'}}.
        """
        x_BLD = self.input_dropout(self.embed_items(tokens_BL).astype(self.dtype), train=train)
        pooled_BQD = self.pool(x_BLD, segments_BL, last=last)
        query_BQD = self.comparable(pooled_BQD, self.temperature)
        return query_BQD, {'pool': {'pooled_BQD': pooled_BQD}}


class LastItem(PooledHistory):
    """The query is the vector of the position's own item."""

    title: ClassVar[str] = 'Last item'

    def pool(self, x_BLD: Array, segments_BL: Array, *, last: bool) -> Array:
        """The vectors as they are, or that of the last column if `last`."""
        return x_BLD[:, -1:] if last else x_BLD


class HistoryMean(PooledHistory):
    """The query is the mean of the vectors of the position's prefix."""

    title: ClassVar[str] = 'Mean of history'

    def pool(self, x_BLD: Array, segments_BL: Array, *, last: bool) -> Array:
        """The mean over each position's prefix, [B, L, D] or [B, 1, D]; zeros at padding."""
        mask_BQS = layers.attention_mask(segments_BL)
        mask_BQS = mask_BQS[:, -1:] if last else mask_BQS
        count_BQ1 = jnp.maximum(mask_BQS.sum(axis=2, keepdims=True), 1)
        total_BQD = jnp.einsum(
            'BQS,BSD->BQD',
            mask_BQS.astype(self.dtype),
            x_BLD,
            preferred_element_type=jnp.float32,
        )
        return (total_BQD / count_BQ1).astype(self.dtype)

"""TV-Rec (Shin et al., NeurIPS 2025, arXiv 2510.25259): filters that differ by position.

A block has no attention. Each position sums the items up to its own with signed weights that depend
on the place t of the position and on the distance k alone, the same for all channels:

    y_t = sum_k h_t(k) x_{t-k},  h_t = sum_m C[t, m] b_m / |b_m|,  m = 1..M
    h = LN(x + y),  x' = LN(h + FFN(h))

There are no position embeddings, and padding is zeros. The paper writes this as a node-variant
graph filter: the items are nodes of a directed cycle, b_m holds the coefficients of powers of its
adjacency matrix, and zeros that are appended to a row keep the cycle from mixing its ends. The
authors apply the filter by the graph's Fourier transform; the sum above is the same.

There are two forms. In `TVRec`, that of the authors, a row is one prefix and places count from its
end, as columns of the authors' left-padded rows do. `CausalTVRec` gives all prefixes of a history
in one pass, so places count from the history's start. Without `time_variant` there is one filter
for all places, and the two forms have the same queries.

The authors' code (yehjin-shin/TV-Rec) differs in two points. b_m is complex there, of which only
the real part acts, since the result's real part is taken; its imaginary part enters the length
|b_m|, and the penalty below. And their zeros are one too few, so that the first of 50 items also
gets the last one, by a weight of its own.

Letters of this file: M filters b_m; L places as well as positions; S distances as well as sources.
"""

import functools
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from fame_jax.batch import Batch
from fame_jax.losses import LossOptions
from fame_jax.models import layers
from fame_jax.models.item_model import ItemModel, unit
from fame_jax.models.objective import add_term, is_equal
from fame_jax.models.options import Count, Length, Rate, Weight
from fame_jax.models.prefix_rows import PrefixRows

Array = jax.Array

# The authors draw C and b with this standard deviation.
filter_init = nn.initializers.normal(stddev=1e-3)


class CausalTVRec(ItemModel):
    """TV-Rec with a query for each position, with filters by position from the history's start.

    The defaults are those of the authors' run.sh for Beauty. For Sports it has 16 filters, for
    ML-1M 8, dropout 0.3, a penalty of 1e-5 and a learning rate of 1e-3.

    Attributes:
      num_blocks: blocks.
      num_filters: M, filters of which each place has a mixture.
      dropout: rate, on the input and on both sublayers of a block.
      max_length: places, and distances of a filter.
      time_variant: whether each place has a mixture of its own; False: all share one.
      orthogonality_weight: of the penalty |B B^T - I|^2, with rows b_m / |b_m|, summed over blocks.
    """

    similarity: Literal['cosine', 'dot'] = 'dot'
    num_blocks: Count = 2
    num_filters: Count = 32
    dropout: Rate = 0.5
    max_length: Length = 50
    time_variant: bool = True
    orthogonality_weight: Weight = 0.0

    title: ClassVar[str] = 'TV-Rec, causal'
    shardable_items: ClassVar[bool] = True

    def setup(self) -> None:
        super().setup()
        self.input_norm = nn.LayerNorm(dtype=self.dtype)
        self.input_dropout = layers.Dropout(self.dropout)
        self.blocks = [
            FilterBlock(
                num_filters=self.num_filters,
                num_places=self.max_length if self.time_variant else 1,
                num_distances=self.max_length,
                dropout=self.dropout,
                dtype=self.dtype,
                name=f'block_{i}',
            )
            for i in range(self.num_blocks)
        ]

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
          positions_BL: int32, from the start of each history.
          segments_BL: int32, which history of the row, 0 for padding.
          train: whether to apply dropout; needs the rng 'dropout'.
          last: compute the last column alone, for rows that end with their history.

        Returns:
          query_BLD, or [B, 1, D] if `last`, and each block's {'filter_BQS'} by name, the weights
          of the items, 0 where Q does not use S.
        """
        x_BLD = self.input_norm(self.embed_items(tokens_BL).astype(self.dtype))
        x_BLD = self.input_dropout(x_BLD, train=train)
        mask_BLL, place_BL = layers.attention_mask(segments_BL), self.places(positions_BL)
        intermediates = {}
        for i, block in enumerate(self.blocks):
            final = i == self.num_blocks - 1
            x_BLD, intermediates[block.name] = block(
                x_BLD, mask_BLL, place_BL, train=train, last=last and final
            )
        return self.comparable(x_BLD, self.temperature), intermediates

    @nn.nowrap
    def places(self, positions_BL: Array) -> Array:
        """The place of each position, int32 [B, L], or [1, L] if it is the same in all rows."""
        return positions_BL

    @nn.nowrap
    def objective(
        self, params: dict, batch: Batch, key: Array, loss: LossOptions
    ) -> tuple[Array, Array, dict[str, Array]]:
        """The loss of the next item plus the weighted penalty, if its weight is not 0.

        Arguments and results are those of `ItemModel.objective`; the metric is 'orthogonality'.
        """
        total, weight, metrics = super().objective(params, batch, key, loss)
        if is_equal(self.orthogonality_weight, 0):
            return total, weight, metrics
        bases = [params[f'block_{i}']['basis'] for i in range(self.num_blocks)]
        term = sum(map(orthogonality, bases)), jnp.ones(())
        total, penalty = add_term(total, weight, term, self.orthogonality_weight)
        return total, weight, metrics | {'orthogonality': penalty}


class TVRec(PrefixRows, CausalTVRec):
    """TV-Rec as its authors train it: a row is one prefix, with filters by place from its end."""

    title: ClassVar[str] = 'TV-Rec'

    @nn.nowrap
    def places(self, positions_BL: Array) -> Array:
        """Columns counted from the end of the row, int32 [1, L]."""
        return jnp.arange(positions_BL.shape[1])[None, ::-1]


class FilterBlock(nn.Module):
    """A post-LayerNorm block of a filter and a feed-forward layer.

    Attributes:
      num_filters: M.
      num_places: places that have a mixture of filters; 1: all share one.
      num_distances: entries of a filter.
      dropout: rate, on both sublayers.
      dtype: of activations.
    """

    num_filters: int
    num_places: int
    num_distances: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(
        self, x_BLD: Array, mask_BLL: Array, place_BL: Array, *, train: bool, last: bool
    ) -> tuple[Array, dict[str, Array]]:
        """A block's output and the weights of its filter.

        Args:
          x_BLD: inputs.
          mask_BLL: bool, the causal mask of `layers.attention_mask`.
          place_BL: int32, may be [1, L].
          train: whether to apply dropout.
          last: compute the last column alone.

        Returns:
          The output, [B, L, D] or [B, 1, D] if `last`, and {'filter_BQS'} of the same columns.
        """
        mixture_LM = self.param('mixture', filter_init, (self.num_places, self.num_filters))
        basis_MS = self.param('basis', filter_init, (self.num_filters, self.num_distances))
        filter_LS = jnp.einsum('LM,MS->LS', mixture_LM, unit(basis_MS))
        queries = slice(-1, None) if last else slice(None)
        place_BQ, mask_BQS = place_BL[:, queries], mask_BLL[:, queries]
        filter_BQS = jnp.where(mask_BQS, select_filters(filter_LS, place_BQ, mask_BQS.shape[2]), 0)
        mixed_BQD = jnp.einsum('BQS,BSD->BQD', filter_BQS.astype(self.dtype), x_BLD)

        drop = functools.partial(layers.Dropout(self.dropout), train=train)
        norm = functools.partial(nn.LayerNorm, dtype=self.dtype)
        h_BQD = norm(name='filter_norm')(x_BLD[:, queries] + drop(mixed_BQD))
        feed_forward = layers.FeedForward(self.dtype, name='feed_forward')
        out_BQD = norm(name='feed_forward_norm')(h_BQD + drop(feed_forward(h_BQD)))
        return out_BQD, {'filter_BQS': filter_BQS}


def select_filters(filter_LS: Array, place_BQ: Array, length: int) -> Array:
    """The filter of each position, by source column.

    Args:
      filter_LS: float32, the weight at each place and distance.
      place_BQ: int32 places of the last Q columns of a row; those past the end take the last.
      length: columns of a row.

    Returns:
      float32 [B, Q, length]; for columns after a position without meaning.
    """
    num_places, num_distances = filter_LS.shape
    column_S = jnp.arange(length)
    distance_QS = column_S[-place_BQ.shape[1] :, None] - column_S[None, :]
    # Both are in range where a position uses a source; elsewhere the mask discards the entry.
    distance_1QS = jnp.clip(distance_QS, 0, num_distances - 1)[None]
    return filter_LS[jnp.minimum(place_BQ, num_places - 1)[:, :, None], distance_1QS]


def orthogonality(basis_MS: Array) -> Array:
    """|B B^T - I|^2 of the rows scaled to length 1: how far the filters are from orthogonal."""
    row_MS = unit(basis_MS)
    gram_MM = jnp.einsum('MS,NS->MN', row_MS, row_MS)
    return jnp.square(gram_MM - jnp.eye(len(row_MS))).sum()

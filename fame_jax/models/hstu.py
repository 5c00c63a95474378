"""HSTU (Zhai et al., ICML 2024, arXiv 2402.17152): gated attention without a softmax.

With LN a LayerNorm without parameters and n a constant, a block is

    [U | V | Q | K] = SiLU(LN(x) W)
    a_ij = SiLU(q_i . k_j + r_{i-j}) / n    for j <= i, in each head
    y_i = x_i + drop(u_i * LN(sum_j a_ij v_j)) W_o + b_o

and x = drop(sqrt(D) E[s] + P) before the first one. The weights of a prefix do not sum to 1.
Queries and items are compared by their cosine, divided by the temperature.

These are choices of the authors' code (meta-recsys/generative-recommenders, in
research/modeling/sequential): r is shared by the heads of a block, logits are not scaled, attention
weights have no dropout, the position table P is there besides r, and LN is over all heads together.
Their n is the number of columns of a padded row, 61 for histories of 50. A row here holds several
histories, and its length must not change their encoding, so n is `max_length` for every row.

Departures: the authors' r also depends on the time between two actions; here it does not, since
batches have no times. They draw negatives for each position; here all positions of a step share
them. Their Adam has beta_2 = .98. They truncate the normal distributions of the tables, and start
b_o uniform within 1 / sqrt(D) of 0; here it starts at 0.
"""

import functools
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from fame_jax.models import layers
from fame_jax.models.item_model import ItemModel, check_heads
from fame_jax.models.options import Count, Heads, Length, Rate, Temperature

Array = jax.Array

xavier_init = nn.initializers.xavier_uniform()


class HSTU(ItemModel):
    """Blocks of pointwise attention over a history's items, with a query for each position.

    The defaults are those of the authors' configuration for Amazon Books, whose width and lengths
    are those of this program (configs/amzn-books/hstu-sampled-softmax-n512-final.gin). For
    MovieLens they use 128 negatives, and on ML-1M 2 blocks, 1 head and dropout .2.

    Attributes:
      num_blocks: blocks.
      num_heads: H, attention heads of each block.
      dropout: rate, on the input sum and on the input of each block's output projection.
      max_length: n, positions of the position table, and distances of the distance bias.
      positions: 'relative', the bias r for each distance; 'start', the table P by position from the
        history's start; or 'both'.
    """

    temperature: Temperature = 0.05
    num_blocks: Count = 4
    num_heads: Heads = 4
    dropout: Rate = 0.5
    max_length: Length = 50
    positions: Literal['relative', 'start', 'both'] = 'both'

    title: ClassVar[str] = 'HSTU'
    shardable_items: ClassVar[bool] = True
    recipe: ClassVar[Mapping[str, Any]] = {'loss': 'sampled', 'num_negatives': 512}

    def setup(self) -> None:
        super().setup()
        if self.positions != 'relative':
            init, shape_LD = nn.initializers.normal(self.width**-0.5), (self.max_length, self.width)
            self.position_table = self.param('position_table', init, shape_LD)
        self.input_dropout = layers.Dropout(self.dropout)
        num_distances = self.max_length if self.positions != 'start' else 0
        self.blocks = [
            PointwiseBlock(
                *(self.num_heads, self.max_length, num_distances, self.dropout, self.dtype),
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
          query_BLD, or [B, 1, D] if `last`, and each block's intermediates by name.
        """
        x_BLD = self.embed_items(tokens_BL) * self.width**0.5
        if self.positions != 'relative':
            x_BLD += self.position_table[positions_BL]
        x_BLD = self.input_dropout(x_BLD.astype(self.dtype), train=train)
        mask_BLL = layers.attention_mask(segments_BL)
        intermediates = {}
        for i, block in enumerate(self.blocks):
            final = i == self.num_blocks - 1
            x_BLD, intermediates[block.name] = block(
                x_BLD, mask_BLL, train=train, last=last and final
            )
        return self.comparable(x_BLD, self.temperature), intermediates

    @nn.nowrap
    def validate(self) -> None:
        """As `ItemModel.validate`; the heads must divide the width."""
        super().validate()
        check_heads(self.width, self.num_heads)


class PointwiseBlock(nn.Module):
    """A block of HSTU, the equations above.

    Attributes:
      num_heads: H.
      divisor: n, by which the weights are divided.
      num_distances: entries of the bias by distance; 0: no bias.
      dropout: rate, on the input of the output projection.
      dtype: of activations.
    """

    num_heads: int
    divisor: int
    num_distances: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(
        self, x_BLD: Array, mask_BLL: Array, *, train: bool, last: bool
    ) -> tuple[Array, dict[str, Array]]:
        """The block's output, [B, L, D] or [B, 1, D] if `last`, and its attention weights."""
        rows, length, width = x_BLD.shape
        norm = functools.partial(nn.LayerNorm, use_scale=False, use_bias=False, dtype=self.dtype)
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        # One product gives all four; if `last`, U and Q of the other columns are not used.
        uvqk = dense(4 * width, use_bias=False, kernel_init=layers.normal_init, name='input')
        parts = jnp.split(nn.silu(uvqk(norm()(x_BLD))), 4, axis=-1)
        gate_BQD, value_BSD, query_BQD, key_BSD = parts
        if last:
            x_BLD, mask_BLL = x_BLD[:, -1:], mask_BLL[:, -1:]
            gate_BQD, query_BQD = gate_BQD[:, -1:], query_BQD[:, -1:]

        def split_heads(y_BLD: Array) -> Array:
            return y_BLD.reshape(rows, -1, self.num_heads, width // self.num_heads)

        bias_HQS = None
        if self.num_distances:
            # H is 1 here: all heads have the same bias.
            table_HL = self.param('distance', layers.normal_init, (1, self.num_distances))
            bias_HQS = layers.distance_bias(table_HL, length)[:, -query_BQD.shape[1] :]
        weight_BHQS = pointwise_weights(
            split_heads(query_BQD), split_heads(key_BSD), mask_BLL, bias_HQS, self.divisor
        )
        mixed_BQHK = jnp.einsum(
            'BHQS,BSHK->BQHK', weight_BHQS.astype(self.dtype), split_heads(value_BSD)
        )
        gated_BQD = gate_BQD * norm()(mixed_BQHK.reshape(gate_BQD.shape))
        dropped_BQD = layers.Dropout(self.dropout)(gated_BQD, train=train)
        output = dense(width, kernel_init=xavier_init, name='output')
        return x_BLD + output(dropped_BQD), {'attention_BHQS': weight_BHQS}


def pointwise_weights(
    query_BQHK: Array, key_BSHK: Array, mask_BQS: Array, bias_HQS: Array | None, divisor: int
) -> Array:
    """SiLU of the logits over a constant, in place of their softmax.

    Args:
      query_BQHK: queries.
      key_BSHK: keys of all positions.
      mask_BQS: bool, True where Q attends to S.
      bias_HQS: added to the logits, H may be 1; None: no bias.
      divisor: n.

    Returns:
      weight_BHQS, float32; 0 where Q does not attend to S, and below 0 where the logit is.
    """
    logit_BHQS = jnp.einsum('BQHK,BSHK->BHQS', query_BQHK, key_BSHK).astype(jnp.float32)
    if bias_HQS is not None:
        logit_BHQS += bias_HQS[None]
    return jnp.where(mask_BQS[:, None], nn.silu(logit_BHQS) / divisor, 0)

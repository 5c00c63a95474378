"""SASRec (Kang & McAuley, ICDM 2018, arXiv 1808.09781), the backbone.

Its BERT-style form, as in S3-Rec, ICLRec and RecBole: post-LayerNorm blocks with an output
projection, GELU, inner width 4D, dropout on the input sum, N(0, 0.02) initialisation, a tied item
table. The original differs: pre-LayerNorm on the query alone, ReLU, inner width D, no output
projection, item vectors times sqrt(D), and binary cross-entropy with one negative.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fame_jax.models import layers

Array = jax.Array


class SASRec(nn.Module):
    """Items and positions in, a query per position out; a score is query . item vector."""

    num_items: int  # V
    width: int
    num_blocks: int
    num_heads: int
    inner_multiple: int
    activation: str
    dropout: float
    max_length: int
    positions: str
    similarity: str
    temperature: float
    tied_items: bool
    item_training: str
    attention_bias: bool
    attention_scale: str
    dtype: Any

    def setup(self) -> None:
        shape_VD = (self.num_items + 1, self.width)
        if self.item_training != 'frozen':
            self.item_table = self.param('item_table', layers.normal_init, shape_VD)
        if self.item_training != 'trained':
            self.frozen_table = self.param('frozen_table', layers.normal_init, shape_VD)
        if not self.tied_items:
            self.output_table = self.param('output_table', layers.normal_init, shape_VD)
        if self.positions != 'relative':
            shape_LD = (self.max_length, self.width)
            self.position_table = self.param('position_table', layers.normal_init, shape_LD)
        self.input_norm = nn.LayerNorm(dtype=self.dtype)
        self.input_dropout = layers.Dropout(self.dropout)
        self.blocks = [self.block(i) for i in range(self.num_blocks)]

    def block(self, index: int) -> nn.Module:
        """The block at a depth; FAME puts another in the last place."""
        return layers.Block(
            self.num_heads,
            self.inner_multiple * self.width,
            self.activation,
            self.dropout,
            self.max_length if self.positions != 'start' else 0,
            self.attention_bias,
            self.attention_scale,
            self.dtype,
            name=f'block_{index}',
        )

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
          train: whether to drop out; wants the rng 'dropout'.
          last: ask for the last column alone, for rows that end with their history.

        Returns:
          query_BLD, or [B, 1, D] if `last`; and each block's named intermediates.
        """
        x_BLD = self.read(tokens_BL)
        if self.positions != 'relative':
            x_BLD += self.position_table[positions_BL]
        x_BLD = self.input_norm(x_BLD.astype(self.dtype))
        x_BLD = self.input_dropout(x_BLD, train=train)
        mask_BLL = layers.visible(segments_BL)
        out = {}
        for i, block in enumerate(self.blocks):
            final = i == self.num_blocks - 1
            x_BLD, out[block.name] = block(x_BLD, mask_BLL, train=train, last=last and final)
        return self.comparable(x_BLD, self.temperature), out

    def read(self, items: Any) -> Array:
        """Rows of the table that items are read from; the frozen part has no gradient."""
        if self.item_training == 'trained':
            return self.item_table[items]
        row = jax.lax.stop_gradient(self.frozen_table)[items]
        return row if self.item_training == 'frozen' else row + self.item_table[items]

    def item_vectors(self) -> Array:
        """What queries are multiplied with, [V + 1, D] by item id; row 0 is the padding's."""
        table_VD = self.read(...) if self.tied_items else self.output_table
        return self.comparable(table_VD.astype(self.dtype))

    def query_and_items(self, *arguments: Any, **options: Any) -> tuple[Array, Array]:
        """Both sides of the score from one call."""
        return self(*arguments, **options)[0], self.item_vectors()

    def comparable(self, x: Array, temperature: float = 1.0) -> Array:
        """Unit length over temperature where similarity is the cosine; as it is for the dot."""
        if self.similarity == 'dot':
            return x
        x32 = x.astype(jnp.float32)
        # Under the root, so that the gradient of a row of zeros is zero and not NaN.
        inverse = jax.lax.rsqrt(jnp.sum(x32 * x32, axis=-1, keepdims=True) + 1e-12)
        return (x32 * (inverse / temperature)).astype(x.dtype)

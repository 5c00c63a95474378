"""SASRec (Kang & McAuley, ICDM 2018, arXiv 1808.09781), the backbone.

This is its BERT-style form, as in S3-Rec, ICLRec and RecBole: post-LayerNorm blocks with an output
projection, GELU, inner width 4D, dropout on the input sum, N(0, 0.02) initialisation, a tied item
table. The original differs: pre-LayerNorm on the query alone, ReLU, inner width D, no output
projection, item vectors times sqrt(D), and binary cross-entropy with one negative.
"""

from typing import ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from fame_jax.models import layers
from fame_jax.models.item_model import ItemModel, check_heads
from fame_jax.models.options import Count, Heads, Length, Rate

Array = jax.Array


class SASRec(ItemModel):
    """A Transformer over a history's items, with a query for each position.

    Attributes:
      num_blocks: Transformer blocks.
      num_heads: H, attention heads of each block.
      dropout: rate, on the input sum, on attention weights and on both sublayers.
      max_length: positions of the position table and distances of the distance bias.
      positions: 'relative', a bias for each head and distance; 'start', a table by position from
        the history's start; or 'both'.
      attention_bias: whether queries, keys and values have a bias (FAME's eqs. 12, 13 have none).
      attention_scale: logits are divided by sqrt(K) ('head', FAME's eq. 14) or sqrt(D) ('model',
        its eq. 3).
    """

    num_blocks: Count = 2
    num_heads: Heads = 2
    dropout: Rate = 0.5
    max_length: Length = 50
    positions: Literal['relative', 'start', 'both'] = 'relative'
    attention_bias: bool = True
    attention_scale: Literal['head', 'model'] = 'head'

    title: ClassVar[str] = 'SASRec'
    shardable_items: ClassVar[bool] = True

    def setup(self) -> None:
        super().setup()
        if self.positions != 'relative':
            shape_LD = (self.num_positions(), self.width)
            self.position_table = self.param('position_table', layers.normal_init, shape_LD)
        self.input_norm = nn.LayerNorm(dtype=self.dtype)
        self.input_dropout = layers.Dropout(self.dropout)
        self.blocks = [self.block(i) for i in range(self.num_blocks)]

    @nn.nowrap
    def num_positions(self) -> int:
        """Rows of the position table."""
        return self.max_length

    @nn.nowrap
    def block(self, index: int) -> nn.Module:
        """The block at a depth; FAME replaces the last one."""
        return layers.Block(self.attention_settings(), name=f'block_{index}')

    @nn.nowrap
    def attention_settings(self) -> layers.AttentionSettings:
        """The settings of every block's attention."""
        return layers.AttentionSettings(
            num_heads=self.num_heads,
            dropout=self.dropout,
            max_distance=self.max_length if self.positions in ('relative', 'both') else 0,
            bias=self.attention_bias,
            scale=self.attention_scale,
            dtype=self.dtype,
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
          train: whether to apply dropout; needs the rng 'dropout'.
          last: compute the last column alone, for rows that end with their history.

        Returns:
          query_BLD, or [B, 1, D] if `last`, and each block's intermediates by name.
        """
        h_BLD, intermediates = self.encode(
            tokens_BL, positions_BL, segments_BL, train=train, last=last
        )
        return self.comparable(h_BLD, self.temperature), intermediates

    def encode(
        self,
        tokens_BL: Array,
        positions_BL: Array,
        segments_BL: Array,
        *,
        train: bool = False,
        last: bool = False,
    ) -> tuple[Array, dict[str, dict[str, Array]]]:
        """As `__call__`, but with the last block's output in place of the query."""
        x_BLD = self.embed_items(tokens_BL)
        return self.transform(x_BLD, positions_BL, segments_BL, train=train, last=last)

    def transform(
        self, x_BLD: Array, positions_BL: Array, segments_BL: Array, *, train: bool, last: bool
    ) -> tuple[Array, dict[str, dict[str, Array]]]:
        """The blocks applied to item embeddings, after positions, LayerNorm and dropout."""
        x_BLD = self.block_input(x_BLD, positions_BL)
        x_BLD = self.input_dropout(x_BLD, train=train)
        mask_BLL = self.attention_mask(segments_BL)
        intermediates = {}
        for i, block in enumerate(self.blocks):
            final = i == self.num_blocks - 1
            x_BLD, intermediates[block.name] = block(
                x_BLD, mask_BLL, train=train, last=last and final
            )
        return x_BLD, intermediates

    def block_input(self, x_BLD: Array, positions_BL: Array) -> Array:
        """The first block's input before dropout: items plus positions, after LayerNorm."""
        return self.input_norm(self.add_positions(x_BLD, positions_BL).astype(self.dtype))

    def add_positions(self, x_BLD: Array, positions_BL: Array) -> Array:
        """Item embeddings plus their rows of the position table, where the model has one."""
        if self.positions == 'relative':
            return x_BLD
        return x_BLD + self.position_table[positions_BL]

    @nn.nowrap
    def attention_mask(self, segments_BL: Array) -> Array:
        """Which positions a position attends to; bool [B, Q, S]."""
        return layers.attention_mask(segments_BL)

    @nn.nowrap
    def validate(self) -> None:
        """As `ItemModel.validate`; the heads must divide the width."""
        super().validate()
        check_heads(self.width, self.num_heads)


class MaskedSASRec(SASRec):
    """SASRec with a [MASK] token, id V + 1, which has an embedding and is never a target."""

    def setup(self) -> None:
        super().setup()
        self.mask_vector = self.param('mask_vector', layers.normal_init, (1, self.width))

    @property
    def mask_id(self) -> int:
        """The id of [MASK]."""
        return self.num_items + 1

    def embed_items(self, tokens_BL: Array) -> Array:
        """Rows of the item table, or the mask's vector; [B, L, D] float32."""
        masked_BL = tokens_BL == self.mask_id
        row_BLD = super().embed_items(jnp.where(masked_BL, 0, tokens_BL))
        return jnp.where(masked_BL[..., None], self.mask_vector.reshape(-1), row_BLD)

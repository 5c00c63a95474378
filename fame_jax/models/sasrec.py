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
from fame_jax.models.items import ItemModel

Array = jax.Array


class SASRec(ItemModel):
    """Items and positions in, a query per position out; a score is query . item vector."""

    num_blocks: int
    num_heads: int
    inner_multiple: int
    activation: str
    dropout: float
    max_length: int
    positions: str
    attention_bias: bool
    attention_scale: str

    def setup(self) -> None:
        super().setup()
        if self.positions != 'relative':
            shape_LD = (self.num_positions(), self.width)
            self.position_table = self.param('position_table', layers.normal_init, shape_LD)
        self.input_norm = nn.LayerNorm(dtype=self.dtype)
        self.input_dropout = layers.Dropout(self.dropout)
        self.blocks = [self.block(i) for i in range(self.num_blocks)]

    def num_positions(self) -> int:
        """Rows of the position table."""
        return self.max_length

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
        h_BLD, out = self.encode(tokens_BL, positions_BL, segments_BL, train=train, last=last)
        return self.comparable(h_BLD, self.temperature), out

    def encode(
        self,
        tokens_BL: Array,
        positions_BL: Array,
        segments_BL: Array,
        *,
        train: bool = False,
        last: bool = False,
    ) -> tuple[Array, dict[str, dict[str, Array]]]:
        """The last block's output before it is made comparable; otherwise as a call."""
        rows = self.read(tokens_BL), positions_BL, segments_BL
        return self.transform(*rows, train=train, last=last)

    def transform(
        self, x_BLD: Array, positions_BL: Array, segments_BL: Array, *, train: bool, last: bool
    ) -> tuple[Array, dict[str, dict[str, Array]]]:
        """The blocks over item vectors, with their positions, LayerNorm and dropout before them."""
        if self.positions != 'relative':
            x_BLD += self.position_table[positions_BL]
        x_BLD = self.input_norm(x_BLD.astype(self.dtype))
        x_BLD = self.input_dropout(x_BLD, train=train)
        mask_BLL = self.visible(segments_BL)
        out = {}
        for i, block in enumerate(self.blocks):
            final = i == self.num_blocks - 1
            x_BLD, out[block.name] = block(x_BLD, mask_BLL, train=train, last=last and final)
        return x_BLD, out

    def visible(self, segments_BL: Array) -> Array:
        """What a position may look at; bool [B, Q, S]."""
        return layers.visible(segments_BL)


class MaskedSASRec(SASRec):
    """SASRec that can also read [MASK], the id V + 1, which is nobody's target."""

    def setup(self) -> None:
        super().setup()
        self.mask_vector = self.param('mask_vector', layers.normal_init, (1, self.width))

    @property
    def mask_id(self) -> int:
        return self.num_items + 1

    def read(self, items: Any) -> Array:
        """Rows of the table, and the mask's vector; `...` asks for the table."""
        if items is ...:
            return super().read(items)
        masked = items == self.mask_id
        row = super().read(jnp.where(masked, 0, items))
        return jnp.where(masked[..., None], self.mask_vector.reshape(-1), row)

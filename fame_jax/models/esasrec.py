"""eSASRec (Tikhonovich et al., RecSys 2025, arXiv 2508.06450): SASRec with the blocks of LiGR.

It predicts the next item at every position, as SASRec does. A block of LiGR (arXiv 2502.03417)
normalises the input of a sublayer, and a gate scales what the sublayer adds:

    x = drop(E[s] + P)
    h = x + sig(x W_1 + b_1) * drop(attention(LN(x)))
    y = h + sig(h W_2 + b_2) * drop(SwiGLU(LN(h)))
    SwiGLU(z) = drop(SiLU(z W_g) * z W_u) W_d          score(v) = y . E[v]

The gates read the input of their sublayer without LayerNorm. There is no LayerNorm before the first
block or after the last one. These are facts of RecTools, in which the authors made their
experiments (rectools/models/nn/transformers/ligr.py), and of their blondered/transformer_benchmark.

Departures: RecTools counts positions from the end of a padded row of fixed length; here they count
from the start of a history, so that a query depends on its prefix alone. RecTools draws all
matrices from Xavier's normal distribution; here they start as in all models, N(0, 0.02). The
authors draw 256 negatives for each position; here all positions of a step share 256.
"""

import functools
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax

from fame_jax.models import layers
from fame_jax.models.options import Count, Heads, Rate
from fame_jax.models.sasrec import SASRec

Array = jax.Array


class ESASRec(SASRec):
    """SASRec with gated pre-LayerNorm blocks, trained by a softmax over sampled items.

    Blocks, heads and dropout are those that the authors chose for Amazon's Beauty, Sports and Toys.
    Of the inner widths that they chose, D for Toys, 2D for Sports and 4D elsewhere, the default is
    the last.

    Attributes:
      inner_multiple: inner width of the feed-forward layers, in multiples of D.
    """

    similarity: Literal['cosine', 'dot'] = 'dot'
    num_blocks: Count = 1
    num_heads: Heads = 1
    dropout: Rate = 0.2
    positions: Literal['relative', 'start', 'both'] = 'start'
    inner_multiple: Count = 4

    title: ClassVar[str] = 'eSASRec'
    recipe: ClassVar[Mapping[str, Any]] = {'loss': 'sampled', 'num_negatives': 256}

    @nn.nowrap
    def block(self, index: int) -> nn.Module:
        """The block at a depth."""
        settings = self.attention_settings()
        return GatedBlock(settings, self.inner_multiple, name=f'block_{index}')

    def block_input(self, x_BLD: Array, positions_BL: Array) -> Array:
        """Item embeddings plus positions, without SASRec's LayerNorm."""
        return self.add_positions(x_BLD, positions_BL).astype(self.dtype)


class SwiGLU(nn.Module):
    """Two dense layers without biases, the first one gated (Shazeer 2020, arXiv 2002.05202).

    Attributes:
      inner_width: between the layers.
      dropout: rate, between the layers.
      dtype: of activations.
    """

    inner_width: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x_BLD: Array, *, train: bool) -> Array:
        """[B, L, D] -> [B, L, D]."""
        dense = functools.partial(
            nn.Dense, use_bias=False, kernel_init=layers.normal_init, dtype=self.dtype
        )
        gate, up = dense(self.inner_width, name='gate'), dense(self.inner_width, name='up')
        inner = layers.Dropout(self.dropout)(nn.silu(gate(x_BLD)) * up(x_BLD), train=train)
        return dense(x_BLD.shape[-1], name='down')(inner)


class GatedBlock(nn.Module):
    """A block of LiGR: x + gate(x) * sublayer(LN(x)), for attention and for SwiGLU.

    Attributes:
      settings: of attention; its dropout is that of the whole block.
      inner_multiple: inner width of SwiGLU, in multiples of D.
    """

    settings: layers.AttentionSettings
    inner_multiple: int

    @nn.compact
    def __call__(
        self, x_BLD: Array, mask_BLL: Array, *, train: bool, last: bool
    ) -> tuple[Array, dict[str, Array]]:
        """The block's output, [B, L, D] or [B, 1, D] if `last`, and its attention weights."""
        settings, width = self.settings, x_BLD.shape[-1]
        norm = functools.partial(nn.LayerNorm, dtype=settings.dtype)
        dense = functools.partial(
            nn.Dense, width, kernel_init=layers.normal_init, dtype=settings.dtype
        )
        drop = functools.partial(layers.Dropout(settings.dropout), train=train)
        attention = layers.Attention(settings, name='attention')
        normed_BLD = norm(name='attention_norm')(x_BLD)
        mixed_BQD, weight_BHNQS = attention(normed_BLD, mask_BLL, train=train, last=last)
        x_BQD = x_BLD[:, -1:] if last else x_BLD
        h_BQD = x_BQD + nn.sigmoid(dense(name='attention_gate')(x_BQD)) * drop(mixed_BQD)
        feed_forward = SwiGLU(
            self.inner_multiple * width, settings.dropout, settings.dtype, name='feed_forward'
        )
        out_BQD = drop(feed_forward(norm(name='feed_forward_norm')(h_BQD), train=train))
        gate_BQD = nn.sigmoid(dense(name='feed_forward_gate')(h_BQD))
        return h_BQD + gate_BQD * out_BQD, {'attention_BHNQS': weight_BHNQS}

"""BSARec (Shin et al., AAAI 2024, arXiv 2312.10325): self-attention and a frequency filter.

A block adds a low-pass filter over the history to attention, in fixed shares:

    low = the part of x with the frequencies |k| <= c // 2 of a Fourier transform of N points
    f = LN(x + low + r^2 (x - low)),  a = LN(x + attention(x)),  h = alpha f + (1 - alpha) a
    x' = LN(h + FFN(h))

with r learned for each channel; r^2 is the paper's beta. Keeping some frequencies is a circular
convolution, low_i = sum_j g(i - j) x_j with g(d) = (1 / N) sum_{|k| <= c // 2} cos(2 pi k d / N),
so it is computed as a product with a constant matrix.

There are two forms. In `BSARec`, that of the authors, a row is one prefix, and low_i also sums over
the items after i. Attention is causal, and positions count from the prefix's end, as columns of the
authors' left-padded rows do. `CausalBSARec` gives all prefixes of a history in one pass: low_i sums
over j <= i alone, which is the value of the authors' filter at the end of the prefix 1..i. With one
block and relative positions the queries of the two forms are therefore equal. With more blocks they
differ, because a higher block also reads the columns before the end of the prefix.

The authors' code (yehjin-shin/BSARec) differs. Its rows have N = 50 columns, and the columns of
padding have vectors, the random one of the padding item plus that of a position, which enter the
filter; here they are zeros, so that a history has the same scores in a row of any width. Attention
weights have a dropout rate of their own there.
"""

import functools
from typing import Annotated, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fame_jax.models import layers
from fame_jax.models.options import Heads, Range, Share
from fame_jax.models.prefix_rows import PrefixRows
from fame_jax.models.sasrec import SASRec

Array = jax.Array


class CausalBSARec(SASRec):
    """BSARec with a query for each position, whose filter uses no later item.

    Options that are not listed are those of SASRec; N is `max_length`. The defaults of c, alpha and
    heads are those of the authors' command for Beauty, and of RecBoard for three Amazon data sets.

    Attributes:
      filter_share: alpha, the share of the filter; attention has the rest.
      cutoff: c; the frequencies up to c // 2 are low.
    """

    similarity: Literal['cosine', 'dot'] = 'dot'
    num_heads: Heads = 1
    filter_share: Share = 0.7
    cutoff: Annotated[int, Range(0, 100_000)] = 5

    title: ClassVar[str] = 'BSARec, causal'

    @nn.nowrap
    def block(self, index: int) -> nn.Module:
        """The block at a depth."""
        return FilterBlock(
            self.attention_settings(),
            filter_share=self.filter_share,
            cutoff=self.cutoff,
            period=self.max_length,
            causal=self.causal,
            name=f'block_{index}',
        )


class BSARec(PrefixRows, CausalBSARec):
    """BSARec as its authors train it: a row is one prefix, which the filter mixes both ways.

    RecBoard has a learning rate of 1e-4 for Beauty and Toys and 5e-4 for Sports, and adds an L2
    term of 1e-4 to the gradient, which is not `--weight_decay`.

    Attributes:
      positions: 'end', a table by position from the prefix's end; or 'relative', as in SASRec.
    """

    positions: Literal['end', 'relative'] = 'end'

    title: ClassVar[str] = 'BSARec'

    def transform(
        self, x_BLD: Array, positions_BL: Array, segments_BL: Array, *, train: bool, last: bool
    ) -> tuple[Array, dict[str, dict[str, Array]]]:
        """As SASRec's, with positions from the end of the row."""
        from_end_BL = positions_BL[:, -1:] - positions_BL
        return super().transform(x_BLD, from_end_BL, segments_BL, train=train, last=last)


class FilterBlock(nn.Module):
    """A post-LayerNorm block of attention and a frequency filter, in fixed shares.

    Attributes:
      settings: of the attention; its dropout is that of the filter's output too.
      filter_share: alpha.
      cutoff: c.
      period: N, points of the Fourier transform.
      causal: whether the filter leaves out the items after a position.
    """

    settings: layers.AttentionSettings
    filter_share: float
    cutoff: int
    period: int
    causal: bool

    @nn.compact
    def __call__(
        self, x_BLD: Array, mask_BLL: Array, *, train: bool, last: bool
    ) -> tuple[Array, dict[str, Array]]:
        """A block's output and intermediates.

        Args:
          x_BLD: inputs.
          mask_BLL: bool, the causal mask of `layers.attention_mask`.
          train: whether to apply dropout.
          last: compute the last column alone.

        Returns:
          The output, [B, L, D] or [B, 1, D] if `last`, and of the same columns the attention
          weights and the low-pass part of x, `low_BQD`.
        """
        dtype = self.settings.dtype
        drop = functools.partial(layers.Dropout(self.settings.dropout), train=train)
        norm = functools.partial(nn.LayerNorm, dtype=dtype)
        queries = slice(-1, None) if last else slice(None)
        own_BQD = x_BLD[:, queries]
        attention = layers.Attention(self.settings, name='attention')
        mixed_BQD, weight_BHNQS = attention(x_BLD, mask_BLL, train=train, last=last)
        attended_BQD = norm(name='attention_norm')(own_BQD + drop(mixed_BQD))

        seen_BLL = mask_BLL if self.causal else mask_BLL | mask_BLL.swapaxes(1, 2)
        kernel_LL = low_pass_matrix(x_BLD.shape[1], self.period, self.cutoff)
        kernel_BQS = jnp.where(seen_BLL[:, queries], kernel_LL[None, queries], 0).astype(dtype)
        low_BQD = jnp.einsum('BQS,BSD->BQD', kernel_BQS, x_BLD)
        # Drawn from N(0, 1), as the authors' sqrt_beta.
        root_D = self.param('root_beta', nn.initializers.normal(1.0), (x_BLD.shape[-1],))
        beta_D = (root_D**2).astype(dtype)
        passed_BQD = low_BQD + beta_D[None, None] * (own_BQD - low_BQD)
        filtered_BQD = norm(name='filter_norm')(own_BQD + drop(passed_BQD))

        h_BQD = self.filter_share * filtered_BQD + (1 - self.filter_share) * attended_BQD
        feed_forward = layers.FeedForward(dtype, name='feed_forward')
        out_BQD = norm(name='feed_forward_norm')(h_BQD + drop(feed_forward(h_BQD)))
        return out_BQD, {'attention_BHNQS': weight_BHNQS, 'low_BQD': low_BQD}


def low_pass_matrix(length: int, period: int, cutoff: int) -> np.ndarray:
    """The matrix whose product with a row of `period` columns keeps its low frequencies.

    A shorter row is a row of `period` columns that begins with zeros.

    Args:
      length: L.
      period: N, points of the Fourier transform.
      cutoff: c; the frequencies k with |k| <= c // 2 are kept, all of them if c >= N.

    Returns:
      float32 [L, L], g(i - j) at (i, j).
    """
    frequency_K = np.arange(period)
    low_K = frequency_K[np.minimum(frequency_K, period - frequency_K) <= cutoff // 2]
    column_L = np.arange(length)
    angle_KL = 2 * np.pi * low_K[:, None] * column_L[None, :] / period
    g_L = np.cos(angle_KL).sum(axis=0) / period  # by distance, in either direction
    return g_L[np.abs(column_L[:, None] - column_L[None, :])].astype(np.float32)

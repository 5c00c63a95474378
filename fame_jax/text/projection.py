"""FAME+ (arXiv 2601.12301): one projection head for each facet, on a frozen text vector t.

    z^h = unit(W2_h gelu(W1_h t + b1_h) + b2_h)

The item's vector is [z^1 | .. | z^H], so that after surgery head h of FAME, whose W_f starts as the
selector of slice h, reads z^h. The public abstract names a frozen text encoder, projection heads
and an alternating contrastive objective; it has no equations, and the form of the heads is ours.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fame_jax.evaluation import facet_probe
from fame_jax.text.facets import Facet

Array = jax.Array
Tree = Mapping[str, Any]


class Head(nn.Module):
    """One facet's projection: two dense layers, GELU between them."""

    inner_width: int
    width: int

    @nn.compact
    def __call__(self, text_BE: Array) -> Array:
        """[B, E] -> [B, K]."""
        inner_BJ = nn.gelu(nn.Dense(self.inner_width, name='up')(text_BE))
        return nn.Dense(self.width, name='down')(inner_BJ)


class Projection(nn.Module):
    """H heads, whose parameters are `head_0`, `head_1`, ...

    Fields:
      num_heads: H.
      width: D; each head has K = D / H columns.
      inner_width: hidden units of each head.
    """

    num_heads: int
    width: int
    inner_width: int

    def setup(self) -> None:
        head_width = self.width // self.num_heads
        self.heads = [
            Head(self.inner_width, head_width, name=f'head_{h}') for h in range(self.num_heads)
        ]

    def __call__(self, text_BE: Array) -> Array:
        """Unit vectors of all heads, [B, H, K]."""
        return jnp.stack([self.head(text_BE, h) for h in range(self.num_heads)], axis=1)

    def head(self, text_BE: Array, h: int) -> Array:
        """Unit vectors of head h, [B, K]."""
        return unit(self.heads[h](text_BE))


def unit(x: Array) -> Array:
    """Scales to unit length over the last axis; zeros stay zeros, with a finite gradient."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)


def item_vectors(module: Projection, params: Tree, text_VE: np.ndarray) -> np.ndarray:
    """Item vectors [z^1 | .. | z^H], float32 [V + 1, D]; zeros for an item without text.

    Args:
      module: with H heads.
      params: its parameters.
      text_VE: float32 [V + 1, E]; a row of zeros means no text.
    """
    item_VHK = module.apply({'params': params}, text_VE)
    item_VD = item_VHK.reshape(len(text_VE), module.width)
    has_text_V1 = text_VE.any(axis=1, keepdims=True)
    return np.where(has_text_V1, item_VD, 0).astype(np.float32)


def probe(
    module: Projection,
    params: Tree,
    text_VE: np.ndarray,
    facets: Sequence[Facet],
    seed: int,
    branches: int = 1,
) -> dict[str, Any]:
    """How well each facet's labels can be read from each head, over the items with a text.

    Args:
      module: with H heads.
      params: its parameters.
      text_VE: float32 [V + 1, E]; a row of zeros means no text.
      facets: the facets' labels.
      seed: of the probe's split and sample.
      branches: as in `facet_probe.match_heads`.

    Returns:
      The figures of `facet_probe.compare`; empty without facets.
    """
    if not facets:
        return {}
    has_text_V = text_VE.any(axis=1)
    item_VHK = np.asarray(module.apply({'params': params}, text_VE[has_text_V]))
    labels = {facet.name: facet.label_VS[has_text_V] for facet in facets}
    return facet_probe.compare(item_VHK.swapaxes(0, 1), labels, seed, branches)

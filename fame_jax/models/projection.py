"""FAME+ (arXiv 2601.12301): from an item's text vector to a vector of its own for each facet.

The abstract gives a frozen text encoder, a projection head per facet and an alternating contrastive
objective, no equations. The two forms here are readings of it:

    independent   z^h = W2_h gelu(W1_h t + b1_h) + b2_h        the item's vector is [z^1 | .. | z^H]
    shared        x = A t + b,  z^h = W_f^h x                  x and W_f are FAME's own, eq. 9
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array


class Head(nn.Module):
    """One facet's own projection, its inner layer as wide as told."""

    inner_width: int
    width: int

    @nn.compact
    def __call__(self, text_BE: Array) -> Array:
        inner_BJ = nn.gelu(nn.Dense(self.inner_width, name='up')(text_BE))
        return nn.Dense(self.width, name='down')(inner_BJ)


class Projection(nn.Module):
    """Text vectors in, a unit vector per head out.

    Parameters of head h lie under `head_h`; what all heads read lies under `adaptor`.
    """

    num_heads: int
    width: int  # D
    inner_width: int
    design: str

    def setup(self) -> None:
        head_width = self.width // self.num_heads
        if self.design == 'shared':
            self.adaptor = nn.Dense(self.width)
            self.heads = [
                nn.Dense(head_width, use_bias=False, name=f'head_{h}')
                for h in range(self.num_heads)
            ]
        else:
            self.heads = [
                Head(self.inner_width, head_width, name=f'head_{h}') for h in range(self.num_heads)
            ]

    def __call__(self, text_BE: Array) -> Array:
        """All heads' unit vectors, [B, H, K]."""
        return jnp.stack([self.head(text_BE, h) for h in range(self.num_heads)], axis=1)

    def head(self, text_BE: Array, h: int) -> Array:
        """The unit vectors of head h, [B, K]."""
        return unit(self.heads[h](self.read(text_BE)))

    def read(self, text_BE: Array) -> Array:
        """What the heads read: x = A t + b, or the text vector itself."""
        return self.adaptor(text_BE) if self.design == 'shared' else text_BE

    def items(self, text_BE: Array) -> Array:
        """The item vectors, [B, D], each block (or the whole, where shared) of unit length."""
        if self.design == 'shared':
            return unit(self.read(text_BE))
        return self(text_BE).reshape(len(text_BE), self.width)


def unit(x: Array) -> Array:
    """Of unit length over the last axis; zeros stay zeros, and their gradient too."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)


def moving(params: dict, turn: Sequence[int]) -> list[str]:
    """The names of what moves in a turn: the heads of its facets, and what all heads read."""
    return [name for name in params if name in {'adaptor', *(f'head_{h}' for h in turn)}]

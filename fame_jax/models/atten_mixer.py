"""Atten-Mixer (Zhang et al., WSDM 2023, arXiv 2206.12781): attention by a history's last items.

Queries of N levels, made of the last item, of the last two, and so on, weight the items of the
history; a head pools the weights of its levels and mixes values:

    h_i = E[s_i] / |E[s_i]|,  c_k = W_k [h_t | h_{t-1} | .. | h_{t-k+1}] + b_k,  k = 1..N
    q_k = c_k / |c| over the levels, entry by entry
    a_ki = softmax_i 2 sig(W_q q_k . W_k h_i),  in each head
    a_i = softmax_i 2 (sum_k a_ki^p)^(1/p)
    z = W [LN(sum_i a_i W_v h_i) | h_t] + b,  score = (z / |z|) . (E_v / |E_v|) / temperature

with zeros for h before a history's start. No part of it depends on positions or on later items, so
one pass over packed rows gives the query of every prefix.

The authors' code (Peiyance/Atten-Mixer-torch) differs. It cuts queries and keys into heads without
moving the axes, so that its heads mix entries of different levels and different items; here a head
is a slice of the width, as for the values in both. Its first softmax includes the row's padding, as
items whose key is b. It draws LayerNorm's scale from the uniform distribution that it uses for all
parameters. And each prefix is a row of its own there; here all prefixes of a row share the dropout
of items.
"""

from collections.abc import Callable
from functools import partial, reduce
from typing import Annotated, Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from fame_jax.models import layers
from fame_jax.models.item_model import ItemModel, check_heads, unit
from fame_jax.models.options import Heads, Range, Rate, Temperature

Array = jax.Array


class AttenMixer(ItemModel):
    """Attention over a history, weighted by its last items; N in the letters are the levels.

    The defaults are those of the authors' main_area_semantic.py.

    Attributes:
      num_heads: H, attention heads.
      num_levels: N, queries of a position, made of its last 1, 2, ... items.
      pooling_norm: p of the pooling over levels.
      dropout: rate, on item embeddings and attention weights.
      item_dropout: rate, on item vectors in training.
    """

    temperature: Temperature = 1 / 16
    num_heads: Heads = 8
    num_levels: Annotated[int, Range(1, 1000)] = 7
    pooling_norm: Annotated[float, Range(1, 64)] = 4.0
    dropout: Rate = 0.1
    item_dropout: Rate = 0.1

    title: ClassVar[str] = 'Atten-Mixer'
    shardable_items: ClassVar[bool] = True
    row_wise_items: ClassVar[bool] = False

    def setup(self) -> None:
        super().setup()
        init = uniform_init(self.width**-0.5)
        dense = partial(nn.Dense, self.width, kernel_init=init, bias_init=init, dtype=self.dtype)
        self.level_queries = [dense(name=f'level_{i + 1}') for i in range(self.num_levels)]
        self.query, self.key, self.value, self.output = dense(), dense(), dense(), dense()
        self.norm = nn.LayerNorm(dtype=self.dtype)
        self.drop = layers.Dropout(self.dropout)
        self.item_drop = layers.Dropout(self.item_dropout)

    def __call__(
        self,
        tokens_BL: Array,
        positions_BL: Array,
        segments_BL: Array,
        *,
        train: bool = False,
        last: bool = False,
    ) -> tuple[Array, dict[str, Array]]:
        """Encodes histories.

        Args:
          tokens_BL: int32 items, 0 for padding.
          positions_BL: not used.
          segments_BL: int32, which history of the row, 0 for padding.
          train: whether to apply dropout; needs the rng 'dropout'.
          last: compute the last column alone, for rows that end with their history.

        Returns:
          query_BLD, or [B, 1, D] if `last`, and attention_BHQS, each head's pooled weights.
        """
        del positions_BL
        # Dropout comes before the scaling to unit length; the authors scale before and after.
        x_BLD = self.drop(self.embed_items(tokens_BL).astype(self.dtype), train=train)
        x_BSD = self.comparable(x_BLD)
        queries = slice(-1, None) if last else slice(None)
        mask_BQS = layers.attention_mask(segments_BL)[:, queries]
        weight_BHQS = self.attention_weights(x_BSD, segments_BL, mask_BQS, last=last)
        value_BSHK = self.split_heads(self.value(x_BSD))
        dropped_BHQS = self.drop(weight_BHQS, train=train).astype(self.dtype)
        mixed_BQHK = jnp.einsum('BHQS,BSHK->BQHK', dropped_BHQS, value_BSHK)
        mixed_BQD = self.norm(mixed_BQHK.reshape(*mixed_BQHK.shape[:2], -1))
        out_BQD = self.output(jnp.concatenate([mixed_BQD, x_BSD[:, queries]], axis=-1))
        return self.comparable(out_BQD, self.temperature), {'attention_BHQS': weight_BHQS}

    def attention_weights(
        self, x_BSD: Array, segments_BS: Array, mask_BQS: Array, *, last: bool
    ) -> Array:
        """Each head's weights of the items, pooled over the levels; float32 [B, H, Q, S]."""
        recent_BQD = recent_items(x_BSD, segments_BS, self.num_levels, last=last)
        levels = [
            dense(recent_BQD[..., : (i + 1) * self.width])
            for i, dense in enumerate(self.level_queries)
        ]
        level_BQND = unit(jnp.stack(levels, axis=-1)).swapaxes(-1, -2)
        query_BQNHK = self.split_heads(self.query(level_BQND))
        key_BSHK = self.split_heads(self.key(x_BSD))
        # A loop over levels takes a CPU a third of the time of an einsum with an axis of levels.
        logits = [
            jnp.einsum('BQHK,BSHK->BHQS', query_BQNHK[:, :, i], key_BSHK).astype(jnp.float32)
            for i in range(self.num_levels)
        ]
        return pool_levels(logits, mask_BQS[:, None], self.pooling_norm)

    def split_heads(self, x: Array) -> Array:
        """The last axis split into heads, [..., H, K]."""
        return x.reshape(*x.shape[:-1], self.num_heads, -1)

    def item_vectors(self, *, train: bool = False) -> Array:
        """The item vectors; if `train`, with entries of the unit vectors dropped."""
        return self.item_drop(super().item_vectors(), train=train)

    @nn.nowrap
    def validate(self) -> None:
        """As `ItemModel.validate`; the heads must divide the width."""
        super().validate()
        check_heads(self.width, self.num_heads)


def recent_items(x_BLD: Array, segments_BL: Array, num_levels: int, *, last: bool) -> Array:
    """Each position's vector, the one before it and so on; zeros before its history's start.

    Args:
      x_BLD: any dtype.
      segments_BL: int32, which history of the row, 0 for padding.
      num_levels: N, vectors of a position.
      last: for the last column alone; Q is then 1.

    Returns:
      [B, Q, N * D], the position's own vector first.
    """
    if last:
        x_BLD, segments_BL = x_BLD[:, -num_levels:], segments_BL[:, -num_levels:]
    length, queries = x_BLD.shape[1], slice(-1, None) if last else slice(None)
    vectors = []
    for step in range(num_levels):
        earlier_BLD = jnp.pad(x_BLD, ((0, 0), (step, 0), (0, 0)))[:, :length]
        earlier_BL = jnp.pad(segments_BL, ((0, 0), (step, 0)))[:, :length]
        same_BL1 = ((earlier_BL == segments_BL) & (segments_BL > 0))[..., None]
        vectors.append(jnp.where(same_BL1, earlier_BLD, 0)[:, queries])
    return jnp.concatenate(vectors, axis=-1)


def pool_levels(logits: list[Array], mask_B1QS: Array, norm: float) -> Array:
    """A softmax over the items for each level, the norm over levels, and a softmax of that.

        softmax_s 2 (sum_n a_ns^p)^(1/p),  a_ns = softmax_s 2 sig(logit_ns)

    The norm is computed with logarithms, so that a_ns^p does not underflow and the root has a
    finite gradient at 0.

    Args:
      logits: one float32 [B, H, Q, S] for each level n.
      mask_B1QS: bool, True where Q attends to S.
      norm: p >= 1.

    Returns:
      weight_BHQS, float32; uniform if a query attends to nothing.
    """
    shares = [log_share(2 * nn.sigmoid(logit_BHQS), mask_B1QS) for logit_BHQS in logits]
    # The gradient through the maximum cancels.
    highest_BHQS = jax.lax.stop_gradient(reduce(jnp.maximum, shares))
    total_BHQS = sum(jnp.exp(norm * (share_BHQS - highest_BHQS)) for share_BHQS in shares)
    pooled_BHQS = jnp.exp(highest_BHQS + jnp.log(total_BHQS) / norm)
    return jax.nn.softmax(jnp.where(mask_B1QS, 2 * pooled_BHQS, layers.MASKED), axis=-1)


def log_share(energy_BHQS: Array, mask_B1QS: Array) -> Array:
    """Log softmax over S of energies in 0..2; finite but meaningless at masked positions."""
    # Energies are small, so no maximum is subtracted; the sum over any item is at least 1.
    total_BHQ1 = jnp.where(mask_B1QS, jnp.exp(energy_BHQS), 0).sum(axis=-1, keepdims=True)
    return energy_BHQS - jnp.log(jnp.maximum(total_BHQ1, 1))


def uniform_init(bound: float) -> Callable[..., Any]:
    """Uniform in -bound..bound; the authors draw every parameter with the bound 1 / sqrt(D)."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init

"""Atten-Mixer (Zhang et al., WSDM 2023, arXiv 2206.12781): attention by a history's last items.

Queries of N levels, of the last item, of the last two, and so on, weigh the items of the history;
a head pools its levels' weights, and mixes values:

    h_i = E[s_i] / |E[s_i]|,  c_k = W_k [h_t | h_{t-1} | .. | h_{t-k+1}] + b_k,  k = 1..N
    q_k = c_k / |c| over the levels, entry by entry
    a_ki = softmax_i 2 sig(W_q q_k . W_k h_i),  in each head
    a_i = softmax_i 2 (sum_k a_ki^p)^(1/p)
    z = W [LN(sum_i a_i W_v h_i) | h_t] + b,  score = (z / |z|) . (E_v / |E_v|) / temperature

with zeros for h before a history's start. Nothing of it knows of positions or of what follows, so
one pass over packed rows has the query of every prefix.

The authors' code (Peiyance/Atten-Mixer-torch) differs. It cuts queries and keys into heads without
moving the axes, so that in its head r stands what belongs to other levels and to other items; here
a head is a slice of the width, as its values are there too. Its first softmax takes in the row's
padding, as items of key b. It draws LayerNorm's scale from the uniform distribution that all else
begins with. And a prefix is a row of its own there: here the items that are dropped, in part, are
the same for all prefixes of a row.
"""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fame_jax.models import layers
from fame_jax.models.items import ItemModel, unit

Array = jax.Array


class AttenMixer(ItemModel):
    """Items in, a query per position out; in the letters N are the levels."""

    num_heads: int
    levels: int
    pooling_norm: float
    dropout: float
    item_dropout: float

    def setup(self) -> None:
        super().setup()
        init = uniform_init(self.width**-0.5)
        dense = partial(nn.Dense, self.width, kernel_init=init, bias_init=init, dtype=self.dtype)
        self.level_queries = [dense(name=f'level_{i + 1}') for i in range(self.levels)]
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
          positions_BL: not read.
          segments_BL: int32, which history of the row, 0 for padding.
          train: whether to drop out; wants the rng 'dropout'.
          last: ask for the last column alone, for rows that end with their history.

        Returns:
          query_BLD, or [B, 1, D] if `last`; and attention_BHQS, each head's pooled weights.
        """
        del positions_BL
        # Dropped before it is of unit length: the authors make it so before and after.
        x_BSD = self.comparable(self.drop(self.read(tokens_BL).astype(self.dtype), train=train))
        asked = slice(-1, None) if last else slice(None)
        mask_BQS = layers.visible(segments_BL)[:, asked]
        weight_BHQS = self.weigh(x_BSD, segments_BL, mask_BQS, last=last)
        value_BSHK = self.heads(self.value(x_BSD))
        dropped_BHQS = self.drop(weight_BHQS, train=train).astype(self.dtype)
        mixed_BQHK = jnp.einsum('BHQS,BSHK->BQHK', dropped_BHQS, value_BSHK)
        mixed_BQD = self.norm(mixed_BQHK.reshape(*mixed_BQHK.shape[:2], -1))
        out_BQD = self.output(jnp.concatenate([mixed_BQD, x_BSD[:, asked]], axis=-1))
        return self.comparable(out_BQD, self.temperature), {'attention_BHQS': weight_BHQS}

    def weigh(self, x_BSD: Array, segments_BS: Array, mask_BQS: Array, *, last: bool) -> Array:
        """Each head's weights of the items, pooled over the levels; float32 [B, H, Q, S]."""
        recent_BQD = recent(x_BSD, segments_BS, self.levels, last=last)
        levels = [
            dense(recent_BQD[..., : (i + 1) * self.width])
            for i, dense in enumerate(self.level_queries)
        ]
        level_BQND = unit(jnp.stack(levels, axis=-1)).swapaxes(-1, -2)
        query_BQNHK, key_BSHK = self.heads(self.query(level_BQND)), self.heads(self.key(x_BSD))
        # A level at a time takes a CPU a third of what it takes with an axis of levels.
        logits = [
            jnp.einsum('BQHK,BSHK->BHQS', query_BQNHK[:, :, i], key_BSHK).astype(jnp.float32)
            for i in range(self.levels)
        ]
        return pool(logits, mask_BQS[:, None], self.pooling_norm)

    def heads(self, x: Array) -> Array:
        """The last axis in heads, [..., H, K]."""
        return x.reshape(*x.shape[:-1], self.num_heads, -1)

    def item_vectors(self, *, train: bool = False) -> Array:
        """As of every model; in training parts of the unit vectors are dropped."""
        return self.item_drop(super().item_vectors(), train=train)


def recent(x_BLD: Array, segments_BL: Array, levels: int, *, last: bool) -> Array:
    """Each position's vector, the one before it and so on, zeros before its history's start.

    Args:
      x_BLD: any dtype.
      segments_BL: int32, which history of the row, 0 for padding.
      levels: N, how many.
      last: of the last column alone, which is then all of Q.

    Returns:
      [B, Q, N * D], the own vector first.
    """
    if last:
        x_BLD, segments_BL = x_BLD[:, -levels:], segments_BL[:, -levels:]
    length, asked = x_BLD.shape[1], slice(-1, None) if last else slice(None)
    found = []
    for step in range(levels):
        earlier_BLD = jnp.pad(x_BLD, ((0, 0), (step, 0), (0, 0)))[:, :length]
        earlier_BL = jnp.pad(segments_BL, ((0, 0), (step, 0)))[:, :length]
        same_BL1 = ((earlier_BL == segments_BL) & (segments_BL > 0))[..., None]
        found.append(jnp.where(same_BL1, earlier_BLD, 0)[:, asked])
    return jnp.concatenate(found, axis=-1)


def pool(logits: list[Array], mask_B1QS: Array, norm: float) -> Array:
    """Softmax over the items at each level, the levels' norm, and a softmax of that.

        softmax_s 2 (sum_n a_ns^p)^(1/p),  a_ns = softmax_s 2 sig(logit_ns)

    The norm is taken of logarithms: no a_ns^p is too small, and a root's slope at 0 is no number.

    Args:
      logits: one float32 [B, H, Q, S] for each level n.
      mask_B1QS: bool, True where Q may look at S.
      norm: p >= 1.

    Returns:
      weight_BHQS, float32; even where a query may look at nothing.
    """
    shares = [log_share(2 * nn.sigmoid(logit_BHQS), mask_B1QS) for logit_BHQS in logits]
    # Its slope cancels.
    highest_BHQS = jax.lax.stop_gradient(reduce(jnp.maximum, shares))
    total_BHQS = sum(jnp.exp(norm * (share_BHQS - highest_BHQS)) for share_BHQS in shares)
    pooled_BHQS = jnp.exp(highest_BHQS + jnp.log(total_BHQS) / norm)
    return jax.nn.softmax(jnp.where(mask_B1QS, 2 * pooled_BHQS, layers.MASKED), axis=-1)


def log_share(energy_BHQS: Array, mask_B1QS: Array) -> Array:
    """Log softmax over S of energies in 0..2; finite, if without meaning, where Q may not look."""
    # Such energies need no maximum taken off; no sum of any is below 1.
    total_BHQ1 = jnp.where(mask_B1QS, jnp.exp(energy_BHQS), 0).sum(axis=-1, keepdims=True)
    return energy_BHQS - jnp.log(jnp.maximum(total_BHQ1, 1))


def uniform_init(bound: float) -> Callable[..., Any]:
    """Uniform in -bound..bound; the authors', with the bound 1 / sqrt(D) for every parameter."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init

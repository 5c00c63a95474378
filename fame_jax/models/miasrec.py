"""MiaSRec (Choi et al., SIGIR 2024, arXiv 2405.00986): a query for each item of a history.

A bidirectional Transformer encodes every item of the history and their mean, and each gives a
query; entmax of an importance excludes some of the queries; an item's score is their highest score
and, to a smaller part, their mean score:

    x_0 = mean_i E[s_i],  x_i = E[s_i], the last item first
    o = Transformer(LN(x + P[i] + R[count of s_i])),  o <- g x + (1 - g) o,  g = sig(W [x | o])
    gamma = entmax(w . o_i),  u_i = o_i / |o_i|
    s_v = (beta max_i u_i . e_v + (1 - beta) mean_i u_i . e_v) / temperature,  i with gamma_i > 0

The mean is the same for all i, so it is added to each query: q_i = (beta u_i + (1 - beta) mean u) /
temperature, and s_v is the highest q_i . e_v.

Three facts about the authors' code (jin530/MiaSRec). It multiplies o_i by gamma_i and scales to
unit length afterwards, so gamma only decides which queries are excluded, and no gradient reaches
the importance. It computes the importance of [o_0 | o_i] with a bias, but terms shared by all
positions cancel in entmax, so w . o_i gives the same. And its published configurations set no
alpha; the code's default of -1 excludes no query, which is `entmax_alpha=1` here.

Differences: an excluded query is excluded from the maximum as from their mean; in their code it, or
any padding of the row, scores 0, or, with alpha -1, like the others, so that a history's scores
depend on the other rows. The mean counts as an item that is not repeated; theirs has the id of item
1. The blocks have feed-forward layers, which their code has only on request; dropout is applied in
the same places.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from fame_jax import losses
from fame_jax.batch import Batch
from fame_jax.losses import LossOptions
from fame_jax.models import layers
from fame_jax.models.item_model import ItemModel, check_heads
from fame_jax.models.objective import chunk_tokens, inputs
from fame_jax.models.options import Count, Heads, Length, Range, Rate, Share

Array = jax.Array

# Items that occur more often share a count vector, as in the authors' code.
MAX_COUNT = 2


class MiaSRec(ItemModel):
    """A query for each item of a history and for their mean; a row is one history.

    Attributes:
      num_blocks: Transformer blocks.
      num_heads: H, attention heads of each block.
      dropout: rate, on embeddings and in the blocks.
      item_dropout: rate, on item vectors in training.
      max_length: positions of the position table.
      attention_bias: whether queries, keys and values have a bias.
      attention_scale: logits are divided by sqrt(K) ('head') or sqrt(D) ('model').
      entmax_alpha: 1, softmax; 1.5, entmax; 2, sparsemax.
      highest_weight: beta, weight of the highest score; the mean score has the rest.
    """

    num_blocks: Count = 2
    num_heads: Heads = 2
    dropout: Rate = 0.1
    item_dropout: Rate = 0.1
    max_length: Length = 50
    attention_bias: bool = True
    attention_scale: Literal['head', 'model'] = 'head'
    entmax_alpha: Annotated[float, Range(1, 2)] = 1.5
    highest_weight: Share = 0.9

    title: ClassVar[str] = 'MiaSRec'
    row_layout: ClassVar[str] = 'prefixes'
    causal: ClassVar[bool] = False
    losses: ClassVar[tuple[str, ...]] = ('ce',)
    row_wise_items: ClassVar[bool] = False
    recipe: ClassVar[Mapping[str, Any]] = {'rows_per_step': 256}

    def setup(self) -> None:
        super().setup()
        shape_LD = (self.max_length + 1, self.width)
        self.position_table = self.param('position_table', layers.normal_init, shape_LD)
        shape_CD = (MAX_COUNT, self.width)
        self.count_table = self.param('count_table', layers.normal_init, shape_CD)
        self.input_norm = nn.LayerNorm(dtype=self.dtype)
        self.drop = layers.Dropout(self.dropout)
        self.item_drop = layers.Dropout(self.item_dropout)
        settings = layers.AttentionSettings(
            num_heads=self.num_heads,
            dropout=self.dropout,
            bias=self.attention_bias,
            scale=self.attention_scale,
            dtype=self.dtype,
        )
        self.blocks = [layers.Block(settings, name=f'block_{i}') for i in range(self.num_blocks)]
        self.gate = nn.Dense(self.width, kernel_init=layers.normal_init, dtype=self.dtype)
        self.importance = self.param('importance', layers.normal_init, (self.width,))

    def __call__(
        self,
        tokens_BL: Array,
        positions_BL: Array,
        segments_BL: Array,
        *,
        train: bool = False,
        last: bool = False,
    ) -> tuple[Array, dict[str, Any]]:
        """Encodes histories; Q = L + 1 queries, the mean's first, then the last item's.

        Args:
          tokens_BL: int32 items, 0 for padding; a row is one history and ends with it.
          positions_BL: not used; positions are counted from the end.
          segments_BL: int32, 0 for padding.
          train: whether to apply dropout; needs the rng 'dropout'.
          last: no effect; the queries are always those of the whole history.

        Returns:
          query_BQD, where an excluded query is replaced by the one of highest gamma; and each
          block's intermediates by name, and gamma_BQ, the importance, float32, 0 for an excluded
          query.
        """
        del positions_BL, last
        tokens_BL, real_BL = tokens_BL[:, ::-1], segments_BL[:, ::-1] > 0
        real_BQ = jnp.pad(real_BL, ((0, 0), (1, 0)), constant_values=True)
        x_BQD = self.drop(self.items_and_mean(tokens_BL, real_BL), train=train)
        o_BQD = self.add_positions(x_BQD, tokens_BL, train=train)
        mask_BQS = jnp.broadcast_to(real_BQ[:, None, :], (*real_BQ.shape, real_BQ.shape[1]))
        intermediates: dict[str, Any] = {}
        for block in self.blocks:
            o_BQD, intermediates[block.name] = block(o_BQD, mask_BQS, train=train, last=False)
        gate_BQD = nn.sigmoid(self.gate(jnp.concatenate([x_BQD, o_BQD], axis=-1)))
        o_BQD = gate_BQD * x_BQD + (1 - gate_BQD) * o_BQD
        importance_BQ = (o_BQD.astype(jnp.float32) * self.importance[None, None]).sum(axis=-1)
        gamma_BQ = entmax(importance_BQ, real_BQ, self.entmax_alpha)
        return self.select_queries(o_BQD, gamma_BQ), {**intermediates, 'gamma_BQ': gamma_BQ}

    def items_and_mean(self, tokens_BL: Array, real_BL: Array) -> Array:
        """The mean of a history's item embeddings, then the embeddings; [B, Q, D]."""
        x_BLD = jnp.where(real_BL[..., None], self.embed_items(tokens_BL), 0)
        count_B = jnp.maximum(real_BL.sum(axis=1), 1)
        mean_BD = x_BLD.sum(axis=1) / count_B[:, None]
        return jnp.concatenate([mean_BD[:, None], x_BLD], axis=1).astype(self.dtype)

    def add_positions(self, x_BQD: Array, tokens_BL: Array, *, train: bool) -> Array:
        """The input of the first block: embeddings plus position and count of each item."""
        count_BL = (tokens_BL[:, :, None] == tokens_BL[:, None, :]).sum(axis=2)
        count_BQ = jnp.pad(count_BL, ((0, 0), (1, 0)), constant_values=1)
        count_BQD = self.count_table[jnp.minimum(count_BQ, MAX_COUNT) - 1]
        position_1QD = self.position_table[jnp.arange(x_BQD.shape[1])][None]
        x_BQD = self.input_norm(x_BQD + (position_1QD + count_BQD).astype(self.dtype))
        return self.drop(x_BQD, train=train)

    def select_queries(self, o_BQD: Array, gamma_BQ: Array) -> Array:
        """The queries with their mean added; excluded ones repeat the one of highest gamma."""
        u_BQD = self.comparable(o_BQD.astype(jnp.float32), self.temperature)
        in_BQ1 = (gamma_BQ > 0)[..., None]
        count_B11 = in_BQ1.sum(axis=1, keepdims=True)
        mean_B1D = jnp.where(in_BQ1, u_BQD, 0).sum(axis=1, keepdims=True) / count_B11
        query_BQD = self.highest_weight * u_BQD + (1 - self.highest_weight) * mean_B1D
        most_B11 = gamma_BQ.argmax(axis=1)[:, None, None]
        query_BQD = jnp.where(in_BQ1, query_BQD, jnp.take_along_axis(query_BQD, most_B11, axis=1))
        return query_BQD.astype(self.dtype)

    def item_vectors(self, *, train: bool = False) -> Array:
        """The item vectors; if `train`, with entries dropped before the scaling to unit length."""
        row_VD = self.item_drop(self.item_table.astype(self.dtype), train=train)
        return self.comparable(row_VD)

    @staticmethod
    def combine(score_BQV: Array) -> Array:
        """The highest score of each item, [B, V]."""
        return highest_score(score_BQV)

    @nn.nowrap
    def item_loss(
        self, params: dict, batch: Batch, key: Array, loss: LossOptions
    ) -> tuple[Array, Array, Any]:
        """Cross-entropy over the catalogue of the item that follows each row's history.

        Args:
          params: the model's parameters.
          batch: fields [B, L]; one history a row, its target and weight in the last column.
          key: consumed, for dropout.
          loss: `chunk_tokens` queries at a time; 0: all.

        Returns:
          The weighted sum over rows and the sum of weights, float32 scalars, and the intermediates.
        """
        query_BQD, item_VD, intermediates = self.apply(
            {'params': params},
            *inputs(batch),
            train=True,
            last=True,
            rngs={'dropout': key},
            method='forward',
        )
        total, weight = losses.multi_query_cross_entropy(
            query_BQD,
            item_VD,
            batch.targets_BL[:, -1],
            batch.weights_BL[:, -1],
            combine=type(self).combine,
            chunk_tokens=chunk_tokens(loss, self.num_items),
        )
        return total, weight, intermediates

    @nn.nowrap
    def validate(self) -> None:
        """As `ItemModel.validate`; entmax is exact for three values of alpha only."""
        super().validate()
        check_heads(self.width, self.num_heads)
        if self.entmax_alpha not in (1, *THRESHOLDS):
            raise ValueError(
                f'entmax_alpha={self.entmax_alpha} has to be 1 (softmax), 1.5 or 2 (sparsemax)'
            )


@jax.custom_vjp
def highest_score(score_BQV: Array) -> Array:
    """The maximum over Q; its gradient goes to the first query that reaches it.

    Equal scores come from repeated queries, whose gradients are added up later, so the gradient
    need not be split among them. That saves a quarter of the loss's time on a CPU.
    """
    return score_BQV.max(axis=1)


def _highest_forward(score_BQV: Array) -> tuple[Array, tuple[Array, Array]]:
    return score_BQV.max(axis=1), (score_BQV.argmax(axis=1), jnp.arange(score_BQV.shape[1]))


def _highest_backward(saved: tuple[Array, Array], d_score_BV: Array) -> tuple[Array]:
    best_BV, query_Q = saved
    return (jnp.where(best_BV[:, None] == query_Q[None, :, None], d_score_BV[:, None], 0),)


highest_score.defvjp(_highest_forward, _highest_backward)


def entmax(score_BQ: Array, real_BQ: Array, alpha: float) -> Array:
    """Sparse probabilities: p_i = [(alpha - 1) s_i - tau]_+ ^ (1 / (alpha - 1)), summing to 1.

    Exact, by sorting: for each k, the threshold tau of the k highest scores is computed, and the k
    is taken whose threshold keeps exactly k scores. Peters et al. 2019 (arXiv 1905.05702, algorithm
    2 for 1.5); sparsemax by Martins & Astudillo 2016 (arXiv 1602.02068, algorithm 1).

    Args:
      score_BQ: float32.
      real_BQ: bool, False for padding, which gets 0. At least one of a row is real.
      alpha: 1 (softmax), 1.5 or 2 (sparsemax).

    Returns:
      p_BQ, float32.

    Raises:
      ValueError: for another alpha.
    """
    score_BQ = jnp.where(real_BQ, score_BQ, layers.MASKED)
    if alpha == 1:
        return jax.nn.softmax(score_BQ, axis=1)
    if alpha not in THRESHOLDS:
        raise ValueError(f'entmax_alpha={alpha} has to be 1 (softmax), 1.5 or 2 (sparsemax)')
    score_BQ = (alpha - 1) * (score_BQ - score_BQ.max(axis=1, keepdims=True))
    # The highest score is 0 and tau is at least -1, so scores below -1 get 0; clipping them at -2
    # keeps the precision of the sums.
    sorted_BQ = jnp.maximum(-jnp.sort(-score_BQ, axis=1), -2)
    tau_BQ = THRESHOLDS[alpha](sorted_BQ, jnp.arange(1, score_BQ.shape[1] + 1)[None])
    size_B1 = (sorted_BQ > tau_BQ).sum(axis=1, keepdims=True)
    tau_B1 = jnp.take_along_axis(tau_BQ, size_B1 - 1, axis=1)
    return jnp.maximum(score_BQ - tau_B1, 0) ** (1 / (alpha - 1))


def _sparsemax_threshold(sorted_BQ: Array, size_1Q: Array) -> Array:
    return (sorted_BQ.cumsum(axis=1) - 1) / size_1Q


def _entmax_threshold(sorted_BQ: Array, size_1Q: Array) -> Array:
    mean_BQ = sorted_BQ.cumsum(axis=1) / size_1Q
    spread_BQ = (sorted_BQ**2).cumsum(axis=1) - size_1Q * mean_BQ**2
    return mean_BQ - jnp.sqrt(jnp.maximum((1 - spread_BQ) / size_1Q, 0))


THRESHOLDS: dict[float, Callable[[Array, Array], Array]] = {
    1.5: _entmax_threshold,
    2: _sparsemax_threshold,
}

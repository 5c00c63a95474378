"""MiaSRec (Choi et al., SIGIR 2024, arXiv 2405.00986): a query for each item of a history.

Every item of the history, and their mean, is read by a bidirectional Transformer and answers for
itself; entmax of an importance leaves some of them out; an item's score is the highest of theirs
and, to a smaller part, their mean:

    x_0 = mean_i E[s_i],  x_i = E[s_i], the last item first
    o = Transformer(LN(x + P[i] + R[count of s_i])),  o <- g x + (1 - g) o,  g = sig(W [x | o])
    gamma = entmax(w . o_i),  u_i = o_i / |o_i|
    s_v = (beta max_i u_i . e_v + (1 - beta) mean_i u_i . e_v) / temperature,  i with gamma_i > 0

The mean is the same for all i, so it is folded into each query: q_i = (beta u_i + (1 - beta) mean
u) / temperature, and s_v is the highest q_i . e_v.

Three things of the authors' code (jin530/MiaSRec) are worth knowing. They multiply o_i by gamma_i
and make it of unit length after that, so gamma says nothing but which queries are out, and no
gradient reaches the importance. They compute the importance of [o_0 | o_i] with a bias, but entmax
does not see what all places share, so w . o_i is the same. And their shipped configurations name no
alpha, for which they take -1, and then nothing is ever out: that is `entmax_alpha` 1 here.

Where we depart: a query that is out is out of the maximum, as of their mean; their code takes it,
and any padding beside the history, for a query that scores 0, or, with alpha -1, for one like the
others, so that a history's scores depend on the rows beside it. The mean counts as one item that is
not repeated; theirs bears the id of item 1. The blocks have feed-forward layers, which their code
leaves out unless told otherwise; dropout falls on what theirs falls on.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fame_jax import losses
from fame_jax.batch import Batch
from fame_jax.errors import UserError
from fame_jax.models import layers
from fame_jax.models.items import ItemModel

Array = jax.Array

# Items that occur more often share a vector, as in the authors' code.
MAX_COUNT = 2


class MiaSRec(ItemModel):
    """Histories of one row each in, a query per item and one of their mean out."""

    num_blocks: int
    num_heads: int
    inner_multiple: int
    activation: str
    dropout: float
    item_dropout: float
    max_length: int
    attention_bias: bool
    attention_scale: str
    entmax_alpha: float
    highest_weight: float

    def setup(self) -> None:
        super().setup()
        shape_LD = (self.max_length + 1, self.width)
        self.position_table = self.param('position_table', layers.normal_init, shape_LD)
        shape_CD = (MAX_COUNT, self.width)
        self.count_table = self.param('count_table', layers.normal_init, shape_CD)
        self.input_norm = nn.LayerNorm(dtype=self.dtype)
        self.drop = layers.Dropout(self.dropout)
        self.item_drop = layers.Dropout(self.item_dropout)
        self.blocks = [self.block(i) for i in range(self.num_blocks)]
        self.gate = nn.Dense(self.width, kernel_init=layers.normal_init, dtype=self.dtype)
        self.importance = self.param('importance', layers.normal_init, (self.width,))

    def block(self, index: int) -> nn.Module:
        """The block at a depth."""
        return layers.Block(
            self.num_heads,
            self.inner_multiple * self.width,
            self.activation,
            self.dropout,
            0,
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
    ) -> tuple[Array, dict[str, Any]]:
        """The queries of histories, Q = L + 1 of them: the mean's, then the last item's first.

        Args:
          tokens_BL: int32 items, 0 for padding; a row is one history and ends with it.
          positions_BL: not read; places are counted from the end.
          segments_BL: int32, 0 for padding.
          train: whether to drop out; wants the rng 'dropout'.
          last: not read; the queries are always those of the whole history.

        Returns:
          query_BQD; a query that is out repeats the one of the highest gamma. And each block's
          named intermediates, and gamma_BQ, the importance; float32, 0 where a query is out.
        """
        del positions_BL, last
        tokens_BL, real_BL = tokens_BL[:, ::-1], segments_BL[:, ::-1] > 0
        real_BQ = jnp.pad(real_BL, ((0, 0), (1, 0)), constant_values=True)
        x_BQD = self.drop(self.items_and_mean(tokens_BL, real_BL), train=train)
        o_BQD = self.embed(x_BQD, tokens_BL, train=train)
        mask_BQS = jnp.broadcast_to(real_BQ[:, None, :], (*real_BQ.shape, real_BQ.shape[1]))
        out: dict[str, Any] = {}
        for block in self.blocks:
            o_BQD, out[block.name] = block(o_BQD, mask_BQS, train=train, last=False)
        gate_BQD = nn.sigmoid(self.gate(jnp.concatenate([x_BQD, o_BQD], axis=-1)))
        o_BQD = gate_BQD * x_BQD + (1 - gate_BQD) * o_BQD
        importance_BQ = (o_BQD.astype(jnp.float32) * self.importance[None, None]).sum(axis=-1)
        out['gamma_BQ'] = entmax(importance_BQ, real_BQ, self.entmax_alpha)
        return self.select(o_BQD, out['gamma_BQ']), out

    def items_and_mean(self, tokens_BL: Array, real_BL: Array) -> Array:
        """The mean of a history's item vectors, then the vectors; [B, Q, D]."""
        x_BLD = jnp.where(real_BL[..., None], self.read(tokens_BL), 0)
        count_B = jnp.maximum(real_BL.sum(axis=1), 1)
        mean_BD = x_BLD.sum(axis=1) / count_B[:, None]
        return jnp.concatenate([mean_BD[:, None], x_BLD], axis=1).astype(self.dtype)

    def embed(self, x_BQD: Array, tokens_BL: Array, *, train: bool) -> Array:
        """What the first block reads: with place and count of each item."""
        count_BL = (tokens_BL[:, :, None] == tokens_BL[:, None, :]).sum(axis=2)
        count_BQ = jnp.pad(count_BL, ((0, 0), (1, 0)), constant_values=1)
        count_BQD = self.count_table[jnp.minimum(count_BQ, MAX_COUNT) - 1]
        place_1QD = self.position_table[jnp.arange(x_BQD.shape[1])][None]
        x_BQD = self.input_norm(x_BQD + (place_1QD + count_BQD).astype(self.dtype))
        return self.drop(x_BQD, train=train)

    def select(self, o_BQD: Array, gamma_BQ: Array) -> Array:
        """The queries that are in, with their mean folded in; the others repeat one of them."""
        u_BQD = self.comparable(o_BQD.astype(jnp.float32), self.temperature)
        in_BQ1 = (gamma_BQ > 0)[..., None]
        count_B11 = in_BQ1.sum(axis=1, keepdims=True)
        mean_B1D = jnp.where(in_BQ1, u_BQD, 0).sum(axis=1, keepdims=True) / count_B11
        query_BQD = self.highest_weight * u_BQD + (1 - self.highest_weight) * mean_B1D
        most_B11 = gamma_BQ.argmax(axis=1)[:, None, None]
        query_BQD = jnp.where(in_BQ1, query_BQD, jnp.take_along_axis(query_BQD, most_B11, axis=1))
        return query_BQD.astype(self.dtype)

    def item_vectors(self, *, train: bool = False) -> Array:
        """As of every model; in training parts are dropped before they are of unit length."""
        table_VD = self.read(...) if self.tied_items else self.output_table
        return self.comparable(self.item_drop(table_VD.astype(self.dtype), train=train))

    @staticmethod
    def combine(score_BQV: Array) -> Array:
        """The highest score of each item, [B, V]."""
        return highest_score(score_BQV)


@jax.custom_vjp
def highest_score(score_BQV: Array) -> Array:
    """The maximum over Q; its gradient goes to the first that reaches it.

    Equal scores are those of repeated queries, whose gradients add up again; so nothing has to be
    shared out, which saves a quarter of the loss's time on a CPU.
    """
    return score_BQV.max(axis=1)


def _highest_forward(score_BQV: Array) -> tuple[Array, tuple[Array, Array]]:
    return score_BQV.max(axis=1), (score_BQV.argmax(axis=1), jnp.arange(score_BQV.shape[1]))


def _highest_backward(saved: tuple[Array, Array], d_score_BV: Array) -> tuple[Array]:
    best_BV, place_Q = saved
    return (jnp.where(best_BV[:, None] == place_Q[None, :, None], d_score_BV[:, None], 0),)


highest_score.defvjp(_highest_forward, _highest_backward)


def highest(
    module: nn.Module, params: dict, batch: Batch, key: Array, *, chunk_tokens: int
) -> tuple[Array, Array]:
    """Cross-entropy over the catalogue of what follows each row's history.

    Args:
      module: a model whose rows have several queries, which its `combine` makes one score of.
      params: its parameters.
      batch: fields [B, L]; one history a row, its target and weight in the last column.
      key: consumed, for dropout.
      chunk_tokens: queries at a time; 0: all.

    Returns:
      The weighted sum over rows and the sum of weights, float32 scalars.
    """
    query_BQD, item_VD = module.apply(
        {'params': params},
        batch.tokens_BL,
        batch.positions_BL,
        batch.segments_BL,
        train=True,
        last=True,
        rngs={'dropout': key},
        method='query_and_items',
    )
    return losses.combined_cross_entropy(
        query_BQD,
        item_VD,
        batch.targets_BL[:, -1],
        batch.weights_BL[:, -1],
        combine=type(module).combine,
        chunk_tokens=chunk_tokens,
    )


def entmax(score_BQ: Array, real_BQ: Array, alpha: float) -> Array:
    """Sparse probabilities: p_i = [(alpha - 1) s_i - tau]_+ ^ (1 / (alpha - 1)), summing to 1.

    Exact, by sorting: of the thresholds that the k highest scores would have, the one that leaves
    just these k in. Peters et al. 2019 (arXiv 1905.05702, algorithm 2 for 1.5); sparsemax by
    Martins & Astudillo 2016 (arXiv 1602.02068, algorithm 1).

    Args:
      score_BQ: float32.
      real_BQ: bool; the others get 0. At least one of a row is real.
      alpha: 1 (softmax), 1.5 or 2 (sparsemax).

    Returns:
      p_BQ, float32.

    Raises:
      UserError: for another alpha.
    """
    score_BQ = jnp.where(real_BQ, score_BQ, layers.MASKED)
    if alpha == 1:
        return jax.nn.softmax(score_BQ, axis=1)
    if alpha not in THRESHOLDS:
        raise UserError(f'entmax_alpha is {alpha}: it must be 1 (softmax), 1.5 or 2 (sparsemax)')
    score_BQ = (alpha - 1) * (score_BQ - score_BQ.max(axis=1, keepdims=True))
    # The highest is 0 and tau at least -1, so what lies below is out; -2 has no digits to lose.
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

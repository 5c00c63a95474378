"""MSGIFSR (Guo et al., WSDM 2022): sessions as graphs of items and of runs of items.

"Learning Multi-granularity Consecutive User Intent Unit for Session-based Recommendation". A run of
k consecutive items is a node of level k = 1..max_unit (`session_graph`). A layer is a graph
attention network for each kind of edge, over the graph and over its reverse; each level is read out
by additive attention over all nodes and gives the history one query; the levels' softmaxes over the
catalogue are mixed (their intent fusion ranking, IFR):

    x_k = unit(mean(e) / 2 + GRU_k(e) / 2) of a run's items e, and x_1 = unit(e)
    h_k = unit(mean(x_k) + max over heads of sum over kinds of edges of (GAT(x) + residual))
    g_k = sum over all nodes n of softmax_n(p_k . sigmoid(U_k h_n + V_k h_k,last)) h_n
    s_k = unit(W_k [h_k,last | g_k])
    P(v) = sum_k softmax(a)_k exp(s_k . unit(e_v) / temperature) / Z_k

Since log P(v) = logsumexp_k (s_k . unit(e_v) / temperature + log softmax(a)_k - log Z_k), a level's
query is [s_k / temperature | log softmax(a)_k - log Z_k], an item vector is [unit(e_v) | 1], and
`combine` is a logsumexp: scores on any part of the catalogue are log-probabilities in the whole of
it. With max_unit=1 there is one softmax, without the column and without Z.

Differences from the authors' code (SpaceLearner/SessionRec-pytorch):
  - No REnorm (their flag `extra`), which moves probability between the items of the session and all
    others. In the data sets used here no user has an item twice, so it could only learn to give the
    former nothing, and within a level it keeps the order of the others, which decides masked ranks.
  - A session of fewer than k items has no run of k. Their code makes one up, of the session's item
    of lowest id repeated k times; here the level is left out and the others get its weight.
  - Each GAT of theirs has a residual matrix and a bias, which enter only by their sum over the
    kinds of edges of a level: here a level has one of each. (Their kind 'inter' shares them between
    levels.) Dropout of nodes is drawn once a layer, not once for each kind of edge.
  - The item table starts as in the other models and is not limited to length 1 (`max_norm`), which
    only affects runs of two and more; GRUs start with Flax's initialisation.

If no item occurs twice, a graph is a path, and each softmax of its attention is over one edge.

Letters of this file: G levels; N nodes of all levels, the columns of one level after another's; K a
second D.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from fame_jax.batch import Batch
from fame_jax.losses import LossOptions
from fame_jax.models import layers, session_graph
from fame_jax.models.item_model import ItemModel, unit
from fame_jax.models.objective import catalogue_loss, inputs
from fame_jax.models.options import Count, Heads, Range, Rate, Temperature
from fame_jax.models.session_graph import GraphLayer, masked_softmax, uniform_init

Array = jax.Array


class MSGIFSR(ItemModel):
    """One query for each level of a history's graph; a score is a logsumexp over levels.

    The defaults are those of the authors' script, but for their width and their longest unit.

    Attributes:
      num_blocks: graph layers.
      num_heads: H, attention heads, each of the full width.
      max_unit: items of the longest runs; the graph has a level for each length up to it.
      dropout: rate.
      partition_chunk: items at a time of the sums Z; 0: all. It changes memory only.
    """

    temperature: Temperature = 1 / 12
    num_blocks: Count = 1
    num_heads: Heads = 8
    max_unit: Annotated[int, Range(1, 64)] = 1
    dropout: Rate = 0.1
    partition_chunk: Annotated[int, Range(0, 10**9)] = 0

    title: ClassVar[str] = 'MSGIFSR'
    row_layout: ClassVar[str] = 'prefixes'
    causal: ClassVar[bool] = False
    losses: ClassVar[tuple[str, ...]] = ('ce',)
    row_wise_items: ClassVar[bool] = False
    recipe: ClassVar[Mapping[str, Any]] = {'rows_per_step': 256}

    def setup(self) -> None:
        super().setup()
        self.input_dropout = layers.Dropout(self.dropout)
        self.cells = [
            nn.GRUCell(self.width, dtype=self.dtype, name=f'gru_{k}')
            for k in range(2, self.max_unit + 1)
        ]
        self.graph_layers = [
            GraphLayer(self.num_heads, self.dropout, self.dtype, name=f'layer_{i}')
            for i in range(self.num_blocks)
        ]
        num_levels, width = self.max_unit, self.width
        self.read_node = self.param('read_node', uniform_init, (num_levels, width, width))
        self.read_last = self.param('read_last', uniform_init, (num_levels, width, width))
        self.read_bias = self.param('read_bias', uniform_init, (num_levels, width))
        self.read_logit = self.param('read_logit', uniform_init, (num_levels, width))
        self.output = self.param('output', uniform_init, (num_levels, 2 * width, width))
        if num_levels > 1:
            self.level_logit = self.param('level_logit', level_init, (num_levels,))

    def __call__(
        self,
        tokens_BL: Array,
        positions_BL: Array,
        segments_BL: Array,
        *,
        train: bool = False,
        last: bool = False,
    ) -> tuple[Array, dict[str, Array]]:
        """Encodes the last history of each row.

        Args:
          tokens_BL: int32 items, 0 for padding.
          positions_BL: not used; the graph has the order of the items.
          segments_BL: int32, which history of the row, 0 for padding; only the history of the last
            column is used.
          train: whether to apply dropout; needs the rng 'dropout'.
          last: no effect; a graph is that of a whole history, so a row always has G queries.

        Returns:
          The queries, [B, G, D + 1] float32, or [B, 1, D] if max_unit is 1, and the attention of
          the readout, float32 {'readout_BGN'}. Rows of padding have finite ones.
        """
        real_BL = (segments_BL > 0) & (segments_BL == segments_BL[:, -1:])
        same_BLL = session_graph.equal_runs(tokens_BL, real_BL, self.max_unit)
        node_BL = [session_graph.nodes(level_BLL) for level_BLL in same_BLL]
        edges = session_graph.edges(same_BLL)
        x_BLD = self.embed_items(tokens_BL).astype(self.dtype)
        levels = self.embed_runs(self.input_dropout(x_BLD, train=train))
        for layer in self.graph_layers:
            levels = layer(levels, node_BL, edges, train=train)
        query_BGD, weight_BGN = self.read_out([unit(h_BLD) for h_BLD in levels], node_BL)
        if self.max_unit > 1:
            ends_BG = jnp.stack([level_BLL[:, -1, -1] for level_BLL in same_BLL], axis=1)
            query_BGD = self.add_log_share(query_BGD, ends_BG)
        return query_BGD, {'readout_BGN': weight_BGN}

    def embed_runs(self, x_BLD: Array) -> list[Array]:
        """For each level, the vector of the run that ends at a column, [B, L, D].

        Columns where no run ends have finite vectors without meaning.
        """
        length = x_BLD.shape[1]
        back = [jnp.pad(x_BLD, ((0, 0), (i, 0), (0, 0)))[:, :length] for i in range(self.max_unit)]
        levels = [unit(x_BLD)]
        for k, cell in enumerate(self.cells, 2):
            state_BLD = jnp.zeros_like(x_BLD)
            for item_BLD in reversed(back[:k]):
                state_BLD, _ = cell(state_BLD, item_BLD)
            levels.append(unit(0.5 * sum(back[:k]) / k + 0.5 * state_BLD))
        return levels

    def read_out(self, levels: list[Array], node_BL: list[Array]) -> tuple[Array, Array]:
        """Each level's s / temperature, [B, G, D], and its attention on nodes, [B, G, N]."""
        last_BGD = jnp.stack([h_BLD[:, -1] for h_BLD in levels], axis=1)
        h_BND, real_BN = jnp.concatenate(levels, axis=1), jnp.concatenate(node_BL, axis=1)
        node_GDK, last_GDK = self.read_node.astype(self.dtype), self.read_last.astype(self.dtype)
        query_BGK = jnp.einsum('BGD,GDK->BGK', last_BGD, last_GDK)
        query_BGK += self.read_bias[None].astype(self.dtype)
        inner_BGNK = jnp.einsum('BND,GDK->BGNK', h_BND, node_GDK) + query_BGK[:, :, None]
        logit_GK = self.read_logit.astype(self.dtype)
        logit_BGN = jnp.einsum('BGNK,GK->BGN', nn.sigmoid(inner_BGNK), logit_GK)
        weight_BGN = masked_softmax(logit_BGN, real_BN[:, None])
        read_BGD = jnp.einsum('BGN,BND->BGD', weight_BGN.astype(self.dtype), h_BND)
        both_BGE = jnp.concatenate([last_BGD, read_BGD], axis=-1)
        query_BGD = jnp.einsum('BGE,GED->BGD', both_BGE, self.output.astype(self.dtype))
        return self.comparable(query_BGD, self.temperature), weight_BGN

    def add_log_share(self, query_BGD: Array, ends_BG: Array) -> Array:
        """The queries with log softmax(a)_k - log Z_k as one more entry; float32 [B, G, D + 1].

        Args:
          query_BGD: of each level.
          ends_BG: bool, whether the history has a run of that length; the entry of a level without
            one is far below zero.
        """
        # A row of padding has no run of any level; its first level is kept.
        there_BG = ends_BG.at[:, 0].set(True)
        share_BG = jax.nn.log_softmax(jnp.where(there_BG, self.level_logit[None], layers.MASKED))
        query_TD = query_BGD.reshape(-1, query_BGD.shape[-1])
        total_T = log_partition(query_TD, super().item_vectors(), self.partition_chunk)
        column_BG = share_BG - total_T.reshape(share_BG.shape)
        return jnp.concatenate([query_BGD.astype(jnp.float32), column_BG[..., None]], axis=-1)

    def item_vectors(self, *, train: bool = False) -> Array:
        """The item vectors, [V + 1, D]; for several levels with one more entry, 1."""
        item_VD = super().item_vectors(train=train)
        if self.max_unit == 1:
            return item_VD
        return jnp.concatenate([item_VD, jnp.ones_like(item_VD[:, :1])], axis=1)

    @staticmethod
    def combine(score_BQV: Array) -> Array:
        """The log-probability of each item, [B, V], from the scores of the levels."""
        return jax.nn.logsumexp(score_BQV, axis=1)

    @nn.nowrap
    def item_loss(
        self, params: dict, batch: Batch, key: Array, loss: LossOptions
    ) -> tuple[Array, Array, Any]:
        """The cross-entropy of the mixture, for the target in each row's last column.

        Args:
          params: the model's parameters.
          batch: fields [B, L], one prefix a row, its target in the last column.
          key: consumed, for dropout.
          loss: with max_unit=1, `chunk_tokens` prefixes and `chunk_items` items at a time.

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
        target_B, weight_B = batch.targets_BL[:, -1], batch.weights_BL[:, -1]
        if self.max_unit == 1:
            total, weight = catalogue_loss(
                query_BQD[:, 0], item_VD, target_B, weight_B, loss=loss, num_items=self.num_items
            )
            return total, weight, intermediates
        target_BD = item_VD[target_B]
        score_BQ = jnp.einsum(
            'BQD,BD->BQ', query_BQD, target_BD, preferred_element_type=jnp.float32
        )
        loss_B = -jax.nn.logsumexp(score_BQ, axis=1)
        return (loss_B * weight_B).sum(), weight_B.sum(), intermediates


def log_partition(query_TD: Array, item_VD: Array, chunk_items: int) -> Array:
    """Log sum over items 1..V of exp(q . x_v), float32 [T]; row 0 is not included.

    Args:
      query_TD: [T, D].
      item_VD: [V + 1, D].
      chunk_items: items at a time, whose scores the backward pass computes again; 0: all at once,
        with the scores stored.
    """
    rest_VD = item_VD[1:]
    num_items, width = rest_VD.shape
    if chunk_items not in range(1, num_items):
        return log_sum_exp(query_TD, rest_VD)
    count = -(-num_items // chunk_items)
    padded_VD = jnp.pad(rest_VD, ((0, count * chunk_items - num_items), (0, 0)))
    real_V = jnp.arange(count * chunk_items) < num_items

    @jax.checkpoint
    def one(chunk: tuple[Array, Array]) -> Array:
        return log_sum_exp(query_TD, *chunk)

    chunks = padded_VD.reshape(count, chunk_items, width), real_V.reshape(count, chunk_items)
    return jax.nn.logsumexp(jax.lax.map(one, chunks), axis=0)


def log_sum_exp(query_TD: Array, item_VD: Array, real_V: Array | None = None) -> Array:
    """Log sum over real items of exp(q . x_v), float32 [T]; at least one must be real."""
    score_TV = jnp.matmul(query_TD, item_VD.T, preferred_element_type=jnp.float32)
    if real_V is not None:
        score_TV = jnp.where(real_V[None], score_TV, -jnp.inf)
    return jax.nn.logsumexp(score_TV, axis=1)


def level_init(key: Array, shape: tuple[int]) -> Array:
    """Initial logits of the levels, 1 for items and 0 for runs, as the authors'; no key needed."""
    return jnp.zeros(shape).at[0].set(1)

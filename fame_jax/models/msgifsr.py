"""MSGIFSR (Guo et al., WSDM 2022): sessions as graphs of items and of runs of items.

"Learning Multi-granularity Consecutive User Intent Unit for Session-based Recommendation". A run of
k consecutive items is a node of level k = 1..order (`session_graph`). A layer is a graph attention
network for each kind of edge, over the graph and over its reverse; each level is read out by
additive attention over all nodes, and gives the history a query of its own; the levels' softmaxes
over the catalogue are mixed (their intent fusion ranking, IFR):

    x_k = unit(mean(e) / 2 + GRU_k(e) / 2) of a run's items e, and x_1 = unit(e)
    h_k = unit(mean(x_k) + max over heads of sum over kinds of edges of (GAT(x) + residual))
    g_k = sum over all nodes n of softmax_n(p_k . sigmoid(U_k h_n + V_k h_k,last)) h_n
    s_k = unit(W_k [h_k,last | g_k])
    P(v) = sum_k softmax(a)_k exp(s_k . unit(e_v) / temperature) / Z_k

Since log P(v) = logsumexp_k (s_k . unit(e_v) / temperature + log softmax(a)_k - log Z_k), a level's
query is [s_k / temperature | log softmax(a)_k - log Z_k], an item is [unit(e_v) | 1], and `combine`
is a logsumexp: scores on any part of the catalogue are log-probabilities in the whole of it. With
order 1 there is one softmax, and neither the column nor Z.

Where this differs from the authors' code (SpaceLearner/SessionRec-pytorch):
  - No REnorm (their flag `extra`), which moves probability between the items of the session and all
    others. In the data of this house no user meets an item twice, so it could only learn to give
    the former nothing, and within a level it keeps the order among the others, which is what masked
    ranks are made of.
  - A session of fewer than k items has no run of k. There the code makes up one, of the session's
    item of lowest id k times over; here the level is left out and its weight goes to the others.
  - Each GAT of theirs has a residual matrix and a bias, which enter only by their sum over the
    kinds of edges of a level: here a level has one of each. (Their kind 'inter' shares them between
    levels.) Nodes drop out once a layer, not once for each kind of edge.
  - The item table starts as the other models' and is not held to length 1 (`max_norm`), which only
    runs of two and more can tell; GRUs start as Flax starts them.

Where no item comes back, a graph is a path, and each softmax of its attention is over one edge.

Letters of this file: G levels; N nodes of all levels, the columns of one level after another's; K a
second D.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from fame_jax import losses
from fame_jax.batch import Batch
from fame_jax.models import layers, session_graph
from fame_jax.models.items import ItemModel, unit
from fame_jax.models.session_graph import GraphLayer, masked_softmax, uniform

Array = jax.Array


class MSGIFSR(ItemModel):
    """One query a level from a history that ends its row; a score is a logsumexp over levels."""

    num_blocks: int
    num_heads: int
    order: int
    dropout: float
    chunk_items: int

    def setup(self) -> None:
        super().setup()
        self.input_dropout = layers.Dropout(self.dropout)
        self.cells = [
            nn.GRUCell(self.width, dtype=self.dtype, name=f'gru_{k}')
            for k in range(2, self.order + 1)
        ]
        self.graph_layers = [
            GraphLayer(self.num_heads, self.dropout, self.dtype, name=f'layer_{i}')
            for i in range(self.num_blocks)
        ]
        num_levels, width = self.order, self.width
        self.read_node = self.param('read_node', uniform, (num_levels, width, width))
        self.read_last = self.param('read_last', uniform, (num_levels, width, width))
        self.read_bias = self.param('read_bias', uniform, (num_levels, width))
        self.read_logit = self.param('read_logit', uniform, (num_levels, width))
        self.output = self.param('output', uniform, (num_levels, 2 * width, width))
        if num_levels > 1:
            self.level_logit = self.param('level_logit', favour_items, (num_levels,))

    def __call__(
        self,
        tokens_BL: Array,
        positions_BL: Array,
        segments_BL: Array,
        *,
        train: bool = False,
        last: bool = False,
    ) -> tuple[Array, dict[str, Array]]:
        """Encodes the history that each row ends with.

        Args:
          tokens_BL: int32 items, 0 for padding.
          positions_BL: not read; where an item stands is told by its neighbours.
          segments_BL: int32, which history of the row, 0 for padding; that of the last column is
            taken, and the others are not seen.
          train: whether to drop out; wants the rng 'dropout'.
          last: of no effect: a graph is that of a whole row, so there is no query for each of its
            columns.

        Returns:
          The queries, [B, G, D + 1] float32 where there are several levels, else [B, 1, D]; and
          float32 attention of the readout, {'readout_BGN'}. Rows of padding have finite ones.
        """
        real_BL = (segments_BL > 0) & (segments_BL == segments_BL[:, -1:])
        same_BLL = session_graph.equal_runs(tokens_BL, real_BL, self.order)
        node_BL = [session_graph.nodes(level_BLL) for level_BLL in same_BLL]
        edges = session_graph.edges(same_BLL)
        x_BLD = self.read(tokens_BL).astype(self.dtype)
        levels = self.runs(self.input_dropout(x_BLD, train=train))
        for layer in self.graph_layers:
            levels = layer(levels, node_BL, edges, train=train)
        query_BGD, weight_BGN = self.read_out([unit(h_BLD) for h_BLD in levels], node_BL)
        if self.order > 1:
            ends_BG = jnp.stack([level_BLL[:, -1, -1] for level_BLL in same_BLL], axis=1)
            query_BGD = self.mix(query_BGD, ends_BG)
        return query_BGD, {'readout_BGN': weight_BGN}

    def runs(self, x_BLD: Array) -> list[Array]:
        """The run of each level that ends at a column, [B, L, D]; anything where none does."""
        length = x_BLD.shape[1]
        back = [jnp.pad(x_BLD, ((0, 0), (i, 0), (0, 0)))[:, :length] for i in range(self.order)]
        levels = [unit(x_BLD)]
        for k, cell in enumerate(self.cells, 2):
            state_BLD = jnp.zeros_like(x_BLD)
            for item_BLD in reversed(back[:k]):
                state_BLD, _ = cell(state_BLD, item_BLD)
            levels.append(unit(0.5 * sum(back[:k]) / k + 0.5 * state_BLD))
        return levels

    def read_out(self, levels: list[Array], node_BL: list[Array]) -> tuple[Array, Array]:
        """Each level's s over temperature, [B, G, D], and its attention on nodes, [B, G, N]."""
        last_BGD = jnp.stack([h_BLD[:, -1] for h_BLD in levels], axis=1)
        h_BND, real_BN = jnp.concatenate(levels, axis=1), jnp.concatenate(node_BL, axis=1)
        node_GDK, last_GDK = self.read_node.astype(self.dtype), self.read_last.astype(self.dtype)
        asked_BGK = jnp.einsum('BGD,GDK->BGK', last_BGD, last_GDK)
        asked_BGK += self.read_bias[None].astype(self.dtype)
        inner_BGNK = jnp.einsum('BND,GDK->BGNK', h_BND, node_GDK) + asked_BGK[:, :, None]
        logit_GK = self.read_logit.astype(self.dtype)
        logit_BGN = jnp.einsum('BGNK,GK->BGN', nn.sigmoid(inner_BGNK), logit_GK)
        weight_BGN = masked_softmax(logit_BGN, real_BN[:, None])
        read_BGD = jnp.einsum('BGN,BND->BGD', weight_BGN.astype(self.dtype), h_BND)
        both_BGE = jnp.concatenate([last_BGD, read_BGD], axis=-1)
        query_BGD = jnp.einsum('BGE,GED->BGD', both_BGE, self.output.astype(self.dtype))
        return self.comparable(query_BGD, self.temperature), weight_BGN

    def mix(self, query_BGD: Array, ends_BG: Array) -> Array:
        """Each level's query, and in a column more how much its softmax counts; float32.

        The column is far below zero in levels that the history has no run for.
        """
        # Of padding alone no level has one; the items' level stays.
        there_BG = ends_BG.at[:, 0].set(True)
        share_BG = jax.nn.log_softmax(jnp.where(there_BG, self.level_logit[None], layers.MASKED))
        query_TD = query_BGD.reshape(-1, query_BGD.shape[-1])
        total_T = log_partition(query_TD, super().item_vectors(), self.chunk_items)
        column_BG = share_BG - total_T.reshape(share_BG.shape)
        return jnp.concatenate([query_BGD.astype(jnp.float32), column_BG[..., None]], axis=-1)

    def item_vectors(self, *, train: bool = False) -> Array:
        """What queries are multiplied with, [V + 1, D], or [V + 1, D + 1] for several levels."""
        item_VD = super().item_vectors(train=train)
        if self.order == 1:
            return item_VD
        return jnp.concatenate([item_VD, jnp.ones_like(item_VD[:, :1])], axis=1)

    @staticmethod
    def combine(score_BQV: Array) -> Array:
        """The log-probability of each item, [B, V], from those of the levels."""
        return jax.nn.logsumexp(score_BQV, axis=1)


def mixture(
    module: MSGIFSR,
    params: dict,
    batch: Batch,
    key: Array,
    *,
    chunk_tokens: int,
    chunk_items: int,
) -> tuple[Array, Array]:
    """Minus the log-probability of the last column's target: cross-entropy of the mixture.

    Args:
      module: an MSGIFSR.
      params: its parameters.
      batch: fields [B, L], a prefix a row, its target in the last column.
      key: consumed, for dropout.
      chunk_tokens: of order 1, prefixes at a time; 0: all.
      chunk_items: of order 1, items at a time; 0: all. The module has its own for log Z.

    Returns:
      The weighted sum over rows and the sum of weights, float32 scalars.
    """
    query_BQD, item_VD = module.apply(
        {'params': params},
        *batch[:3],
        train=True,
        last=True,
        rngs={'dropout': key},
        method='query_and_items',
    )
    target_B, weight_B = batch.targets_BL[:, -1], batch.weights_BL[:, -1]
    if module.order == 1:
        return losses.chunked_cross_entropy(
            query_BQD[:, 0],
            item_VD,
            target_B,
            weight_B,
            chunk_tokens=chunk_tokens,
            chunk_items=chunk_items,
        )
    picked_BD = item_VD[target_B]
    score_BQ = jnp.einsum('BQD,BD->BQ', query_BQD, picked_BD, preferred_element_type=jnp.float32)
    loss_B = -jax.nn.logsumexp(score_BQ, axis=1)
    return (loss_B * weight_B).sum(), weight_B.sum()


def log_partition(query_TD: Array, item_VD: Array, chunk_items: int) -> Array:
    """Log sum over items 1..V of exp(q . x_v), float32 [T]; row 0 is left out.

    Args:
      query_TD: [T, D].
      item_VD: [V + 1, D].
      chunk_items: items at a time, multiplied again in the backward pass; 0: all, and kept for it.
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
    """Log sum over real items of exp(q . x_v), float32 [T]; at least one has to be real."""
    score_TV = jnp.matmul(query_TD, item_VD.T, preferred_element_type=jnp.float32)
    if real_V is not None:
        score_TV = jnp.where(real_V[None], score_TV, -jnp.inf)
    return jax.nn.logsumexp(score_TV, axis=1)


def favour_items(key: Array, shape: tuple[int]) -> Array:
    """Logits of the levels as the authors start them, 1 for items and 0 for runs; no key needed."""
    return jnp.zeros(shape).at[0].set(1)

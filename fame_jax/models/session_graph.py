"""Graphs of a history's items and runs of items, as dense masks, and attention along their edges.

A node of level k is a run of k consecutive items (a k-gram) that occurs in the history; equal runs
are one node. A row of L columns has at most L nodes of a level. A mask says which columns end with
the same run, and the first such column represents the node, so no list of nodes and no lookup is
needed. Edges are masks over columns too. The graph is that of MSGIFSR (Guo et al., WSDM 2022);
`seq_to_ccs_graph` of the authors' code builds it on the host, with a Python dictionary a history.

    history      1 2 1 2
    level 1      1 2         edges  1-2 2-1         within the level, run to next run
    level 2      12 21       edges  12-21 21-12     within the level
                                    1-21 2-12       an item to the run that follows it
                                    12-1 21-2       a run to the item that follows it

Letters of this file: Q, S columns where an edge ends and starts; H heads, each of width D (K for a
second D in one einsum).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fame_jax.models import layers

Array = jax.Array


class Edges(NamedTuple):
    """The edges of one kind from one level to another; levels count from 0."""

    kind: str
    source: int
    target: int
    link_BQS: Array  # bool, True for all columns of the two nodes; `nodes` has one column for each


def equal_runs(tokens_BL: Array, real_BL: Array, max_unit: int) -> list[Array]:
    """For each level k = 1..max_unit, which columns end with the same run of k real items.

    Args:
      tokens_BL: int32.
      real_BL: bool; the real columns are contiguous.
      max_unit: items of the longest run.

    Returns:
      bool [B, L, L] for each level; all False in a column where no run ends.
    """
    same_BLL = tokens_BL[:, :, None] == tokens_BL[:, None, :]
    same_BLL &= real_BL[:, :, None] & real_BL[:, None, :]
    levels = [same_BLL]
    while len(levels) < max_unit:
        # Runs are equal if their last items are, and the shorter runs before these.
        before_BLL = jnp.pad(levels[-1], ((0, 0), (1, 0), (1, 0)))[:, :-1, :-1]
        levels.append(same_BLL & before_BLL)
    return levels


def nodes(same_BLL: Array) -> Array:
    """The first column of each node of a level; bool [B, L]."""
    length = same_BLL.shape[1]
    earlier_1LL = jnp.tri(length, k=-1, dtype=bool)[None]
    ends_BL = jnp.diagonal(same_BLL, axis1=1, axis2=2)
    return ends_BL & ~jnp.any(same_BLL & earlier_1LL, axis=2)


def edges(levels: list[Array]) -> list[Edges]:
    """All edges of a graph, from its `equal_runs`.

    'intra_k' goes from a run of k items to the run that ends one item later; 'inter', for k > 1,
    from an item to the run that begins after it, and from a run to the item after it. Two nodes
    have one edge, however often one follows the other.
    """
    result = []
    for k, same_BLL in enumerate(levels):
        result.append(Edges(f'intra_{k + 1}', k, k, link(same_BLL, same_BLL, 1)))
    for k, same_BLL in enumerate(levels[1:], 1):
        result.append(Edges('inter', 0, k, link(levels[0], same_BLL, k + 1)))
        result.append(Edges('inter', k, 0, link(same_BLL, levels[0], 1)))
    return result


def link(source_BLL: Array, target_BLL: Array, shift: int) -> Array:
    """Whether the run of column Q occurs `shift` columns after the run of S; bool [B, Q, S].

    Args:
      source_BLL: `equal_runs` of the level of S.
      target_BLL: `equal_runs` of the level of Q.
      shift: > 0.
    """
    length = source_BLL.shape[1]
    here_BIS = source_BLL[:, : max(length - shift, 0)].astype(jnp.float32)
    later_BIQ = target_BLL[:, shift:].astype(jnp.float32)
    return jnp.einsum('BIQ,BIS->BQS', later_BIQ, here_BIS) > 0


def uniform_init(key: Array, shape: tuple[int, ...]) -> Array:
    """Uniform in +-1 / sqrt(D), D the last axis; the authors draw every parameter so."""
    bound = shape[-1] ** -0.5
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


class GraphAttention(nn.Module):
    """Attention of the nodes at the ends of edges over those at their starts (GAT, 1710.10903)."""

    num_heads: int
    dtype: Any

    @nn.compact
    def __call__(
        self, source_BSD: Array, target_BQD: Array, link_BQS: Array, drop: Callable[[Array], Array]
    ) -> Array:
        """[B, Q, H, D], without a residual; zeros where no edge ends."""
        width = source_BSD.shape[-1]
        kernel_HDK = self.param('kernel', uniform_init, (self.num_heads, width, width))
        source_HK = self.param('source', uniform_init, (self.num_heads, width)).astype(self.dtype)
        target_HK = self.param('target', uniform_init, (self.num_heads, width)).astype(self.dtype)
        kernel_HDK = kernel_HDK.astype(self.dtype)
        value_BSHK = jnp.einsum('BSD,HDK->BSHK', source_BSD, kernel_HDK)
        source_BHS = jnp.einsum('BSHK,HK->BHS', value_BSHK, source_HK)
        target_DH = jnp.einsum('HDK,HK->DH', kernel_HDK, target_HK)
        target_BHQ = jnp.einsum('BQD,DH->BHQ', target_BQD, target_DH)
        logit_BHQS = nn.leaky_relu(target_BHQ[..., None] + source_BHS[:, :, None], 0.2)
        weight_BHQS = masked_softmax(logit_BHQS, link_BQS[:, None])
        # The softmax of a node without edges is uniform; its weights have to be 0.
        weight_BHQS = jnp.where(link_BQS[:, None], weight_BHQS, 0)
        weight_BHQS = drop(weight_BHQS).astype(self.dtype)
        return jnp.einsum('BHQS,BSHK->BQHK', weight_BHQS, value_BSHK)


class GraphLayer(nn.Module):
    """The sum of graph attention over every kind of edge, in both directions."""

    num_heads: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(
        self, levels: list[Array], node_BL: list[Array], edges: list[Edges], *, train: bool
    ) -> list[Array]:
        """The new vectors of each level's nodes, [B, L, D], in every column of a node."""
        drop = functools.partial(layers.Dropout(self.dropout), train=train)
        x_BLD = [drop(level_BLD) for level_BLD in levels]
        h_BLHD = [self.residual(k, level_BLD) for k, level_BLD in enumerate(x_BLD)]
        attention = {
            (kind, way): GraphAttention(self.num_heads, self.dtype, name=f'{kind}_{way}')
            for kind in dict.fromkeys(edge.kind for edge in edges)
            for way in ('forward', 'reverse')
        }
        for kind, a, b, link_BQS in edges:
            along_BQS = link_BQS & node_BL[a][:, None]
            against_BQS = link_BQS.swapaxes(1, 2) & node_BL[b][:, None]
            h_BLHD[b] += attention[kind, 'forward'](x_BLD[a], x_BLD[b], along_BQS, drop)
            h_BLHD[a] += attention[kind, 'reverse'](x_BLD[b], x_BLD[a], against_BQS, drop)
        return [
            mean_over(level_BLD, real_BL) + one_BLHD.max(axis=2)
            for level_BLD, real_BL, one_BLHD in zip(levels, node_BL, h_BLHD)
        ]

    def residual(self, level: int, x_BLD: Array) -> Array:
        """The residual of a level's nodes in each head, [B, L, H, D]."""
        width = x_BLD.shape[-1]
        shape_HDK = (self.num_heads, width, width)
        w_HDK = self.param(f'residual_{level + 1}', uniform_init, shape_HDK).astype(self.dtype)
        bias_HK = self.param(f'bias_{level + 1}', uniform_init, (self.num_heads, width))
        y_BLHK = jnp.einsum('BLD,HDK->BLHK', x_BLD, w_HDK)
        return y_BLHK + bias_HK[None, None].astype(self.dtype)


def masked_softmax(logit: Array, mask: Array) -> Array:
    """The softmax over the last axis where mask is True, in float32; uniform if it never is."""
    return jax.nn.softmax(jnp.where(mask, logit.astype(jnp.float32), layers.MASKED), axis=-1)


def mean_over(x_BLD: Array, real_BL: Array) -> Array:
    """The mean over the real columns, [B, 1, D]; zeros if there are none."""
    total_B1D = jnp.einsum('BLD,BL->BD', x_BLD, real_BL.astype(x_BLD.dtype))[:, None]
    return total_B1D / jnp.maximum(real_BL.sum(axis=1), 1)[:, None, None].astype(x_BLD.dtype)

"""FAME's block: mixture-of-experts attention in each head, and the gate over the heads.

Equation numbers are the paper's (arXiv 2411.01457).
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fame_jax.models import experts, layers

Array = jax.Array

BALANCE = 'balance'  # the collection that the block sows a term in, for `fame.balanced`


def slice_selectors(key: Array, shape_HDK: tuple[int, int, int]) -> Array:
    """W_f that hands head h slice h of the item vector; the key is not used."""
    num_heads, width, head_width = shape_HDK
    eye_DHK = jnp.eye(width).reshape(width, num_heads, head_width)
    return eye_DHK.transpose(1, 0, 2)


class FacetBlock(nn.Module):
    """Mixture-of-experts attention, one prediction per head, and the gate over heads."""

    num_heads: int
    num_experts: int
    routing: str
    active_experts: int
    dropout: float
    attention_dropout: float
    attention: str
    remat: str
    max_distance: int
    bias: bool
    scale: str
    attention_residual: str
    output_projection: str
    facet_init: str
    facet_learned: bool
    gate_scale: str
    ffn_shared: bool
    dtype: Any

    @nn.compact
    def __call__(
        self, x_BLD: Array, mask_BLL: Array, *, train: bool, last: bool
    ) -> tuple[Array, dict[str, Array]]:
        """The collapsed query u, [B, L, D] or [B, 1, D] if `last`, and the intermediates:

        attention_BHNQS, router_BLHN (beta, eq. 16), heads_BLHK (F, eq. 7), gate_BLH (g, eq. 10) and
        facet_HDK (W_f, eq. 9). Where --routing=inputs, experts that are not active do not attend:
        their attention is 0. The term of `balanced` is sown where it is asked for.
        """
        dropout = layers.Dropout(self.dropout)
        drop = functools.partial(dropout, train=train)
        own = self.attention_dropout
        weight_dropout = dropout if own < 0 else layers.Dropout(own)
        asked_BLD = x_BLD[:, -1:] if last else x_BLD
        f_BLHK, weight_BHNQS, router_BLHN = self.mix(
            x_BLD, asked_BLD, mask_BLL, weight_dropout, train, last
        )
        f_BLHK = self.add_residual(asked_BLD, f_BLHK, drop)
        heads_BLHK = self.feed_forward(f_BLHK, drop)
        gate_BLH = self.gate(heads_BLHK)
        facet_HDK = self.facets(x_BLD.shape[-1])
        u_BLD = jnp.einsum('BLH,BLHK,HDK->BLD', gate_BLH, heads_BLHK, facet_HDK)
        return u_BLD, {
            'attention_BHNQS': weight_BHNQS,
            'router_BLHN': router_BLHN,
            'heads_BLHK': heads_BLHK,
            'gate_BLH': gate_BLH,
            'facet_HDK': facet_HDK,
        }

    def mix(
        self,
        x_BLD: Array,
        asked_BLD: Array,
        mask_BLL: Array,
        dropout: layers.Dropout,
        train: bool,
        last: bool,
    ) -> tuple[Array, Array, Array]:
        """What the experts of each head gather together, f_BLHK (eqs. 12 to 17).

        And the attention and the router of all experts.
        """
        rows = x_BLD, mask_BLL, dropout, train, last
        query_BLHNK = self.queries(asked_BLD)
        if self.routing == 'outputs':
            f_BLHNK, weight_BHNQS = self.experts(query_BLHNK, *rows)
            share_BLHN = self.route(f_BLHNK.reshape(*f_BLHNK.shape[:3], -1), 'BLHE,HEN->BLHN')
            router_BLHN, _ = self.choose(share_BLHN, mask_BLL)
            f_BLHK = jnp.einsum('BLHN,BLHNK->BLHK', router_BLHN, f_BLHNK)  # (17)
            return f_BLHK, weight_BHNQS, router_BLHN
        share_BLHN = self.route(asked_BLD, 'BLD,HDN->BLHN')
        router_BLHN, pick_BLHAN = self.choose(share_BLHN, mask_BLL)
        if pick_BLHAN is None:
            f_BLHNK, weight_BHNQS = self.experts(query_BLHNK, *rows)
            f_BLHK = jnp.einsum('BLHN,BLHNK->BLHK', router_BLHN, f_BLHNK)
            return f_BLHK, weight_BHNQS, router_BLHN
        f_BLHAK, weight_BHAQS = self.experts(experts.gather(query_BLHNK, pick_BLHAN), *rows)
        f_BLHK = jnp.einsum('BLHN,BLHAN,BLHAK->BLHK', router_BLHN, pick_BLHAN, f_BLHAK)
        return f_BLHK, experts.spread(weight_BHAQS, pick_BLHAN), router_BLHN

    def queries(self, asked_BLD: Array) -> Array:
        """A query from each expert of each head (eq. 12)."""
        width = asked_BLD.shape[-1]
        shape_HNDK = (self.num_heads, self.num_experts, width, width // self.num_heads)
        return layers.project(self, 'query', shape_HNDK, 'BLD,HNDK->BLHNK', asked_BLD)

    def experts(
        self,
        query_BLHNK: Array,
        x_BLD: Array,
        mask_BLL: Array,
        dropout: layers.Dropout,
        train: bool,
        last: bool,
    ) -> tuple[Array, Array]:
        """What each expert of each head gathers from the history (eqs. 13-15), and its weights."""
        width = x_BLD.shape[-1]
        shape_HDK = (self.num_heads, width, width // self.num_heads)
        key_BLHK = layers.project(self, 'key', shape_HDK, 'BLD,HDK->BLHK', x_BLD)
        value_BLHK = layers.project(self, 'value', shape_HDK, 'BLD,HDK->BLHK', x_BLD)
        where = (
            mask_BLL[:, -1:] if last else mask_BLL,
            layers.relative_bias(self, x_BLD.shape[1], last),
            layers.attention_scale(self.scale, width, shape_HDK[-1]),
        )
        batch, length, num_heads, num_queries, _ = query_BLHNK.shape
        shape_BHNQS = batch, num_heads, num_queries, length, x_BLD.shape[1]
        octets_BHNQS = dropout.draw(shape_BHNQS, train=train)

        def attend(query_BQHNK: Array, octets_BHNQS: Array | None) -> Array:
            if self.attention == 'fused':
                return experts.attend_fused(query_BQHNK, key_BLHK, value_BLHK, *where)
            drop = functools.partial(layers.thin, octets=octets_BHNQS, rate=dropout.rate)
            return layers.attend(query_BQHNK, key_BLHK, value_BLHK, *where, drop)[0]

        # Of weights that nobody reads nothing is computed.
        weight_BHNQS = layers.weigh(query_BLHNK, key_BLHK, *where)
        if self.remat == 'experts' and train:
            return experts.in_turns(attend, query_BLHNK, octets_BHNQS), weight_BHNQS
        return attend(query_BLHNK, octets_BHNQS), weight_BHNQS

    def route(self, x: Array, equation: str) -> Array:
        """beta, how much each expert of a head counts (eq. 16); no bias.

        From the experts' outputs, E numbers side by side, or from the position's hidden state.
        """
        shape = (self.num_heads, x.shape[-1], self.num_experts)
        w = self.param('router', layers.normal_init, shape).astype(self.dtype)
        return softmax(jnp.einsum(equation, x, w))

    def choose(self, share_BLHN: Array, mask_BLL: Array) -> tuple[Array, Array | None]:
        """The router, and who is active; None: all are."""
        active = self.active_experts
        if active in (0, self.num_experts):
            return share_BLHN, None
        router_BLHN, pick_BLHAN = experts.choose(share_BLHN, active)
        if self.is_mutable_collection(BALANCE) and not self.is_initializing():
            real_BL = jnp.diagonal(mask_BLL, axis1=1, axis2=2)
            self.sow(BALANCE, 'term', experts.balance(share_BLHN, router_BLHN, real_BL))
        return router_BLHN, pick_BLHAN

    def add_residual(
        self, asked_BLD: Array, f_BLHK: Array, drop: Callable[[Array], Array]
    ) -> Array:
        """From eq. 17 to eq. 7, where the paper is silent on W_O, residual and LayerNorm."""
        shape_BLHK = f_BLHK.shape
        f_BLD = f_BLHK.reshape(asked_BLD.shape)
        if self.output_projection == 'keep':
            width, (num_heads, head_width) = f_BLD.shape[-1], shape_BLHK[-2:]
            w_HKD = self.param('output', layers.normal_init, (num_heads, head_width, width))
            bias_D = self.param('output_bias', nn.initializers.zeros, (width,))
            f_BLD = jnp.einsum('BLHK,HKD->BLD', f_BLHK, w_HKD.astype(self.dtype))
            f_BLD += bias_D[None, None].astype(self.dtype)
        if self.attention_residual != 'none':
            f_BLD = asked_BLD + drop(f_BLD)
        if self.attention_residual == 'norm':
            f_BLD = nn.LayerNorm(dtype=self.dtype, name='attention_norm')(f_BLD)
        return f_BLD.reshape(shape_BLHK)

    def feed_forward(self, f_BLHK: Array, drop: Callable[[Array], Array]) -> Array:
        """F = LN(f + Dropout(FFN'(f))) in each head (eq. 7), one FFN' for all or one each."""
        num_heads, width = (1 if self.ffn_shared else self.num_heads), f_BLHK.shape[-1]
        up_HKK = self.param('up', layers.normal_init, (num_heads, width, width))
        up_bias_HK = self.param('up_bias', nn.initializers.zeros, (num_heads, width))
        down_HKK = self.param('down', layers.normal_init, (num_heads, width, width))
        down_bias_HK = self.param('down_bias', nn.initializers.zeros, (num_heads, width))

        def dense(x_BLHK: Array, w_HKK: Array, bias_HK: Array) -> Array:
            w_HKK = jnp.broadcast_to(w_HKK, (self.num_heads, width, width)).astype(self.dtype)
            y_BLHK = jnp.einsum('BLHK,HKJ->BLHJ', x_BLHK, w_HKK)
            return y_BLHK + bias_HK[None, None].astype(self.dtype)

        inner_BLHK = nn.relu(dense(f_BLHK, up_HKK, up_bias_HK))
        # E[x^2] - E[x]^2, the faster way to the variance, loses its digits in narrow heads.
        norm = nn.LayerNorm(dtype=self.dtype, use_fast_variance=False, name='feed_forward_norm')
        return norm(f_BLHK + drop(dense(inner_BLHK, down_HKK, down_bias_HK)))

    def gate(self, heads_BLHK: Array) -> Array:
        """The heads' weights g (eq. 10), summing to 1, or to H where equal gates shall be ones."""
        width = heads_BLHK.shape[-1] * self.num_heads
        w_HKH = self.param('gate', layers.normal_init, (width, self.num_heads)).astype(self.dtype)
        bias_H = self.param('gate_bias', nn.initializers.zeros, (self.num_heads,))
        all_BLD = heads_BLHK.reshape(*heads_BLHK.shape[:2], width)
        gate_BLH = softmax(all_BLD @ w_HKH + bias_H[None, None].astype(self.dtype))
        return gate_BLH * (self.num_heads if self.gate_scale == 'heads' else 1)

    def facets(self, width: int) -> Array:
        """W_f [H, D, K] (eq. 9)."""
        init = slice_selectors if self.facet_init == 'slices' else layers.normal_init
        w_HDK = self.param('facet', init, (self.num_heads, width, width // self.num_heads))
        if not self.facet_learned:
            w_HDK = jax.lax.stop_gradient(w_HDK)
        return w_HDK.astype(self.dtype)


def softmax(logit: Array) -> Array:
    """Over the last axis, in float32, in the dtype it came in."""
    return jax.nn.softmax(logit.astype(jnp.float32), axis=-1).astype(logit.dtype)

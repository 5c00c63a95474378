"""FAME's block: mixture-of-experts attention in each head, and the gate over the heads.

Equation numbers are those of the paper (arXiv 2411.01457).
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from fame_jax.models import experts, layers

Array = jax.Array


def slice_selectors(key: Array, shape_HDK: tuple[int, int, int]) -> Array:
    """W_f that selects slice h of the item vector for head h; the key is not used."""
    num_heads, width, head_width = shape_HDK
    eye_DHK = jnp.eye(width).reshape(width, num_heads, head_width)
    return eye_DHK.transpose(1, 0, 2)


class FAMEBlock(nn.Module):
    """Mixture-of-experts attention, one prediction per head, and the gate over heads.

    The fields are the options of the same name in `FAME`.
    """

    settings: layers.AttentionSettings
    num_experts: int
    routing: str
    active_experts: int
    remat: bool
    attention_residual: str
    output_projection: str
    facet_init: str
    gate_scale: str
    ffn_shared: bool

    @nn.compact
    def __call__(
        self, x_BLD: Array, mask_BLL: Array, *, train: bool, last: bool
    ) -> tuple[Array, dict[str, Array]]:
        """The collapsed query u of each position.

        Args:
          x_BLD: hidden states.
          mask_BLL: bool, which positions a position attends to.
          train: whether to apply dropout; needs the rng 'dropout'.
          last: compute the last column alone.

        Returns:
          u_BLD, or [B, 1, D] if `last`, and the intermediates: attention_BHNQS; share_BLHN, the
          router's softmax over all experts; router_BLHN (beta, eq. 16), its weights after the
          selection of active experts; heads_BLHK (F, eq. 7); gate_BLH (g, eq. 10); facet_HDK (W_f,
          eq. 9). With routing by inputs, inactive experts do not attend: their attention is 0.
        """
        dropout = layers.Dropout(self.settings.dropout)
        drop = functools.partial(dropout, train=train)
        query_input_BLD = x_BLD[:, -1:] if last else x_BLD
        f_BLHK, weight_BHNQS, share_BLHN, router_BLHN = self.mix(
            x_BLD, query_input_BLD, mask_BLL[:, -1:] if last else mask_BLL, dropout, train
        )
        f_BLHK = self.add_residual(query_input_BLD, f_BLHK, drop)
        heads_BLHK = self.feed_forward(f_BLHK, drop)
        gate_BLH = self.gate(heads_BLHK)
        facet_HDK = self.facet_projection(x_BLD.shape[-1])
        u_BLD = jnp.einsum('BLH,BLHK,HDK->BLD', gate_BLH, heads_BLHK, facet_HDK)
        return u_BLD, {
            'attention_BHNQS': weight_BHNQS,
            'share_BLHN': share_BLHN,
            'router_BLHN': router_BLHN,
            'heads_BLHK': heads_BLHK,
            'gate_BLH': gate_BLH,
            'facet_HDK': facet_HDK,
        }

    def mix(
        self,
        x_BLD: Array,
        query_input_BLD: Array,
        mask_BQS: Array,
        dropout: layers.Dropout,
        train: bool,
    ) -> tuple[Array, Array, Array, Array]:
        """The mixture of a head's experts (eqs. 12 to 17).

        Returns:
          f_BLHK; the attention of all experts; the router's softmax; and its weights.
        """
        attend = functools.partial(
            self.expert_attention, x_BLD=x_BLD, mask_BQS=mask_BQS, dropout=dropout, train=train
        )
        query_BLHNK = self.queries(query_input_BLD)
        if self.routing == 'outputs':
            f_BLHNK, weight_BHNQS = attend(query_BLHNK)
            share_BLHN = self.route(f_BLHNK.reshape(*f_BLHNK.shape[:3], -1), 'BLHE,HEN->BLHN')
            router_BLHN, _ = self.select_experts(share_BLHN)
            f_BLHK = jnp.einsum('BLHN,BLHNK->BLHK', router_BLHN, f_BLHNK)  # (17)
            return f_BLHK, weight_BHNQS, share_BLHN, router_BLHN
        share_BLHN = self.route(query_input_BLD, 'BLD,HDN->BLHN')
        router_BLHN, pick_BLHAN = self.select_experts(share_BLHN)
        if pick_BLHAN is None:
            f_BLHNK, weight_BHNQS = attend(query_BLHNK)
            f_BLHK = jnp.einsum('BLHN,BLHNK->BLHK', router_BLHN, f_BLHNK)
            return f_BLHK, weight_BHNQS, share_BLHN, router_BLHN
        f_BLHAK, weight_BHAQS = attend(experts.gather_queries(query_BLHNK, pick_BLHAN))
        f_BLHK = jnp.einsum('BLHN,BLHAN,BLHAK->BLHK', router_BLHN, pick_BLHAN, f_BLHAK)
        weight_BHNQS = experts.scatter_weights(weight_BHAQS, pick_BLHAN)
        return f_BLHK, weight_BHNQS, share_BLHN, router_BLHN

    def queries(self, query_input_BLD: Array) -> Array:
        """A query of each expert of each head (eq. 12)."""
        width, num_heads = query_input_BLD.shape[-1], self.settings.num_heads
        shape_HNDK = (num_heads, self.num_experts, width, width // num_heads)
        return layers.project(
            self, 'query', shape_HNDK, 'BLD,HNDK->BLHNK', query_input_BLD, self.settings
        )

    def expert_attention(
        self,
        query_BLHNK: Array,
        *,
        x_BLD: Array,
        mask_BQS: Array,
        dropout: layers.Dropout,
        train: bool,
    ) -> tuple[Array, Array]:
        """The attention output of each expert of each head (eqs. 13-15), and its weights."""
        settings, width = self.settings, x_BLD.shape[-1]
        shape_HDK = (settings.num_heads, width, width // settings.num_heads)
        key_BLHK, value_BLHK = layers.project_all(
            self, ('key', 'value'), shape_HDK, x_BLD, settings
        )
        logits = (
            mask_BQS,
            layers.relative_bias(self, x_BLD.shape[1], query_BLHNK.shape[1], settings),
            settings.factor(width),
        )
        batch, length, num_heads, num_queries, _ = query_BLHNK.shape
        shape_BHNQS = batch, num_heads, num_queries, length, x_BLD.shape[1]
        bits_BHNQS = dropout.draw_bits(shape_BHNQS, train=train)

        def attend(query_BQHNK: Array, bits_BHNQS: Array | None) -> Array:
            drop = functools.partial(
                layers.apply_dropout, dropout_bits=bits_BHNQS, rate=dropout.rate
            )
            return layers.attend(query_BQHNK, key_BLHK, value_BLHK, *logits, drop)[0]

        # The weights before dropout; XLA removes this product if the caller does not use them.
        weight_BHNQS = layers.attention_weights(query_BLHNK, key_BLHK, *logits)
        if self.remat and train:
            return experts.attend_in_turns(attend, query_BLHNK, bits_BHNQS), weight_BHNQS
        return attend(query_BLHNK, bits_BHNQS), weight_BHNQS

    def route(self, x: Array, equation: str) -> Array:
        """The softmax over a head's experts (eq. 16), [B, L, H, N]; no bias.

        x is the experts' outputs side by side, E entries, or the position's hidden state.
        """
        shape = (self.settings.num_heads, x.shape[-1], self.num_experts)
        w = self.param('router', layers.normal_init, shape).astype(self.settings.dtype)
        return softmax(jnp.einsum(equation, x, w))

    def select_experts(self, share_BLHN: Array) -> tuple[Array, Array | None]:
        """The router's weights and the one-hot selection of active experts; None: all are."""
        if self.active_experts in (0, self.num_experts):
            return share_BLHN, None
        return experts.top_k_experts(share_BLHN, self.active_experts)

    def add_residual(self, x_BLD: Array, f_BLHK: Array, drop: Callable[[Array], Array]) -> Array:
        """Output projection, residual and LayerNorm of f, on which the paper is silent."""
        shape_BLHK = f_BLHK.shape
        f_BLD = f_BLHK.reshape(x_BLD.shape)
        dtype = self.settings.dtype
        if self.output_projection == 'keep':
            width, (num_heads, head_width) = f_BLD.shape[-1], shape_BLHK[-2:]
            w_HKD = self.param('output', layers.normal_init, (num_heads, head_width, width))
            bias_D = self.param('output_bias', nn.initializers.zeros, (width,))
            f_BLD = jnp.einsum('BLHK,HKD->BLD', f_BLHK, w_HKD.astype(dtype))
            f_BLD += bias_D[None, None].astype(dtype)
        if self.attention_residual != 'none':
            f_BLD = x_BLD + drop(f_BLD)
        if self.attention_residual == 'norm':
            f_BLD = nn.LayerNorm(dtype=dtype, name='attention_norm')(f_BLD)
        return f_BLD.reshape(shape_BLHK)

    def feed_forward(self, f_BLHK: Array, drop: Callable[[Array], Array]) -> Array:
        """F = LN(f + Dropout(FFN'(f))) in each head (eq. 7); FFN' is shared or one per head."""
        settings, width = self.settings, f_BLHK.shape[-1]
        num_nets = 1 if self.ffn_shared else settings.num_heads
        up_HKK = self.param('up', layers.normal_init, (num_nets, width, width))
        up_bias_HK = self.param('up_bias', nn.initializers.zeros, (num_nets, width))
        down_HKK = self.param('down', layers.normal_init, (num_nets, width, width))
        down_bias_HK = self.param('down_bias', nn.initializers.zeros, (num_nets, width))

        def dense(x_BLHK: Array, w_HKK: Array, bias_HK: Array) -> Array:
            w_HKK = jnp.broadcast_to(w_HKK, (settings.num_heads, width, width))
            y_BLHK = jnp.einsum('BLHK,HKJ->BLHJ', x_BLHK, w_HKK.astype(settings.dtype))
            return y_BLHK + bias_HK[None, None].astype(settings.dtype)

        inner_BLHK = nn.relu(dense(f_BLHK, up_HKK, up_bias_HK))
        # The fast variance E[x^2] - E[x]^2 loses precision in narrow heads.
        norm = nn.LayerNorm(dtype=settings.dtype, use_fast_variance=False, name='feed_forward_norm')
        return norm(f_BLHK + drop(dense(inner_BLHK, down_HKK, down_bias_HK)))

    def gate(self, heads_BLHK: Array) -> Array:
        """The heads' weights g (eq. 10); they sum to 1, or to H with gate_scale='heads'."""
        dtype, num_heads = self.settings.dtype, self.settings.num_heads
        width = heads_BLHK.shape[-1] * num_heads
        w_HKH = self.param('gate', layers.normal_init, (width, num_heads)).astype(dtype)
        bias_H = self.param('gate_bias', nn.initializers.zeros, (num_heads,))
        all_BLD = heads_BLHK.reshape(*heads_BLHK.shape[:2], width)
        gate_BLH = softmax(all_BLD @ w_HKH + bias_H[None, None].astype(dtype))
        return gate_BLH * (num_heads if self.gate_scale == 'heads' else 1)

    def facet_projection(self, width: int) -> Array:
        """W_f [H, D, K] (eq. 9)."""
        num_heads = self.settings.num_heads
        init = slice_selectors if self.facet_init == 'slices' else layers.normal_init
        w_HDK = self.param('facet', init, (num_heads, width, width // num_heads))
        return w_HDK.astype(self.settings.dtype)


def softmax(logit: Array) -> Array:
    """The softmax over the last axis, computed in float32, in the dtype of the logits."""
    return jax.nn.softmax(logit.astype(jnp.float32), axis=-1).astype(logit.dtype)

"""FAME (Liu, Zhang & Long, WSDM 2025, arXiv 2411.01457): facets by heads, preferences by experts.

FAME is SASRec with another last block; the paper says that it fits any model that attends, and here
is BERT4Rec's encoder with it too. Equation numbers are the paper's. Its score (eq. 11),

    P(v) = sum_h g_h (x_v W_f^h) . F^h = x_v . u,    u = sum_h g_h W_f^h F^h,

is linear in the item, so training, ranking and export use the one vector u and the plain item
table. `head_scores` is the long form, for explanation.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fame_jax import surgery
from fame_jax.models import layers
from fame_jax.models.bert4rec import BidirectionalSASRec
from fame_jax.models.sasrec import SASRec

Array = jax.Array


def slice_selectors(key: Array, shape_HDK: tuple[int, int, int]) -> Array:
    """W_f that hands head h slice h of the item vector; the key is not used."""
    num_heads, width, head_width = shape_HDK
    eye_DHK = jnp.eye(width).reshape(width, num_heads, head_width)
    return eye_DHK.transpose(1, 0, 2)


class FacetBlock(nn.Module):
    """Mixture-of-experts attention, one prediction per head, and the gate over heads."""

    num_heads: int
    num_experts: int
    dropout: float
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
        facet_HDK (W_f, eq. 9).
        """
        drop = functools.partial(layers.Dropout(self.dropout), train=train)
        asked_BLD = x_BLD[:, -1:] if last else x_BLD
        f_BLHNK, weight_BHNQS = self.experts(x_BLD, asked_BLD, mask_BLL, drop, last)
        router_BLHN = self.route(f_BLHNK)
        f_BLHK = jnp.einsum('BLHN,BLHNK->BLHK', router_BLHN, f_BLHNK)  # (17)
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

    def experts(
        self,
        x_BLD: Array,
        asked_BLD: Array,
        mask_BLL: Array,
        drop: Callable[[Array], Array],
        last: bool,
    ) -> tuple[Array, Array]:
        """What each expert of each head gathers from the history (eqs. 12-15)."""
        width = x_BLD.shape[-1]
        head_width = width // self.num_heads
        shape_HDK = (self.num_heads, width, head_width)
        shape_HNDK = (self.num_heads, self.num_experts, width, head_width)
        query_BLHNK = layers.project(self, 'query', shape_HNDK, 'BLD,HNDK->BLHNK', asked_BLD)
        key_BLHK = layers.project(self, 'key', shape_HDK, 'BLD,HDK->BLHK', x_BLD)
        value_BLHK = layers.project(self, 'value', shape_HDK, 'BLD,HDK->BLHK', x_BLD)
        return layers.attend(
            query_BLHNK,
            key_BLHK,
            value_BLHK,
            mask_BLL[:, -1:] if last else mask_BLL,
            layers.relative_bias(self, x_BLD.shape[1], last),
            layers.attention_scale(self.scale, width, head_width),
            drop,
        )

    def route(self, f_BLHNK: Array) -> Array:
        """beta, how much each expert of a head counts (eq. 16); no bias."""
        num_experts, head_width = f_BLHNK.shape[-2:]
        shape_HEN = (self.num_heads, num_experts * head_width, num_experts)
        w_HEN = self.param('router', layers.normal_init, shape_HEN).astype(self.dtype)
        f_BLHE = f_BLHNK.reshape(*f_BLHNK.shape[:-2], num_experts * head_width)
        logit_BLHN = jnp.einsum('BLHE,HEN->BLHN', f_BLHE, w_HEN)
        return softmax(logit_BLHN)

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


class FAME(SASRec):
    """SASRec whose last block is a FacetBlock."""

    num_experts: int
    attention_residual: str
    output_projection: str
    facet_init: str
    facet_learned: bool
    gate_scale: str
    ffn_shared: bool

    def block(self, index: int) -> nn.Module:
        """The backbone's block, and the facet block in the last place."""
        if index < self.num_blocks - 1:
            return super().block(index)
        return FacetBlock(
            self.num_heads,
            self.num_experts,
            self.dropout,
            self.max_length if self.positions != 'start' else 0,
            self.attention_bias,
            self.attention_scale,
            self.attention_residual,
            self.output_projection,
            self.facet_init,
            self.facet_learned,
            self.gate_scale,
            self.ffn_shared,
            self.dtype,
            name='facet_block',
        )

    def look(self, tokens_BL: Array, positions_BL: Array, segments_BL: Array) -> dict[str, Array]:
        """What stands behind the last column's query, for rows that end with their history.

        Returns:
          gate_BH; head_BHD, each head's own query, so that the query is their sum weighted by the
          gate; router_BHN and attention_BHNL where the query is read; positions_BLHN, the router at
          every position. float32.
        """
        u_BLD, out = self.encode(tokens_BL, positions_BL, segments_BL)
        block = {name: x.astype(jnp.float32) for name, x in out['facet_block'].items()}
        head_BHD = jnp.einsum('BHK,HDK->BHD', block['heads_BLHK'][:, -1], block['facet_HDK'])
        # The length of u divides the heads' parts too, or they would not add up to the query.
        u_BD = u_BLD[:, -1].astype(jnp.float32)
        squared_B = jnp.einsum('BD,BD->B', self.comparable(u_BD, self.temperature), u_BD)
        scale_B = squared_B / jnp.maximum(jnp.einsum('BD,BD->B', u_BD, u_BD), 1e-12)
        return {
            'gate_BH': block['gate_BLH'][:, -1],
            'head_BHD': head_BHD * scale_B[:, None, None],
            'router_BHN': block['router_BLHN'][:, -1],
            'attention_BHNL': block['attention_BHNQS'][:, :, :, -1],
            'positions_BLHN': block['router_BLHN'],
        }


class FAMEBERT4Rec(FAME, BidirectionalSASRec):
    """BERT4Rec's encoder whose last block is a FacetBlock, trained by `bert4rec.cloze`.

    The block sees both sides as the others do. u meets the item table itself, without the head of
    BERT4Rec, or the collapse of eq. 11 would not be one.
    """

    def look(self, tokens_BL: Array, positions_BL: Array, segments_BL: Array) -> dict[str, Array]:
        """As FAME's, asked by [MASK]; what attention rests on [MASK] itself is left out."""
        found = super().look(*self.ask(tokens_BL, positions_BL, segments_BL))
        return {
            **found,
            'attention_BHNL': found['attention_BHNL'][..., :-1],
            'positions_BLHN': found['positions_BLHN'][:, :-1],
        }


def head_scores(
    gate_BLH: Array, heads_BLHK: Array, facet_HDK: Array, item_VD: Array
) -> tuple[Array, Array]:
    """Each head's own score of each item, and their gated sum (eqs. 8, 9, 11).

    Args:
      gate_BLH: g, as the block used it.
      heads_BLHK: F.
      facet_HDK: W_f.
      item_VD: item vectors, V of them or any slice.

    Returns:
      score_BLHV before the gate, and score_BLV. For the cosine, divide both by |u| * temperature
      and take unit item vectors: the identity stays.
    """
    item_HVK = jnp.einsum('VD,HDK->HVK', item_VD, facet_HDK)
    score_BLHV = jnp.einsum('BLHK,HVK->BLHV', heads_BLHK, item_HVK)
    return score_BLHV, jnp.einsum('BLH,BLHV->BLV', gate_BLH, score_BLHV)


def plan(module: FAME, key: Array, expert_init: str, expert_noise: float) -> surgery.Plan:
    """How a pre-trained SASRec, or BERT4Rec, becomes this FAME (section 4.4.2).

    Args:
      module: the FAME to be.
      key: consumed for the experts' noise.
      expert_init: 'upcycle' (W_Q plus noise, Komatsuzaki et al., arXiv 2212.05055) or 'random'.
      expert_noise: deviation of that noise.
    """
    old, new = f'block_{module.num_blocks - 1}', 'facet_block'
    kept = ['key', 'value'] + (['key_bias', 'value_bias'] if module.attention_bias else [])
    if module.positions != 'start':
        kept.append('distance')
    if module.output_projection == 'keep':
        kept += ['output', 'output_bias']
    copy = {f'{new}/{name}': f'{old}/attention/{name}' for name in kept}
    if module.attention_residual == 'norm':
        copy |= {
            f'{new}/attention_norm/{name}': f'{old}/attention_norm/{name}'
            for name in ('scale', 'bias')
        }
    transform = {}
    for name in ['query'] + (['query_bias'] if module.attention_bias else []):
        if expert_init == 'upcycle':
            path, key = f'{new}/{name}', jax.random.fold_in(key, 1)
            copy[path] = f'{old}/attention/{name}'
            transform[path] = _upcycle(key, module.num_experts, expert_noise)
    # The last two are BERT4Rec's output; SASRec has none.
    dropped = f'{old}/', 'head/', 'item_bias'
    return surgery.Plan(copy=copy, transform=transform, fresh=f'{new}/', dropped=dropped)


def _upcycle(key: Array, num_experts: int, noise: float) -> Any:
    """[H, ...] -> [H, N, ...]: N copies, each with its own noise; one alone is left as it is."""

    def spread(w: Array) -> Array:
        copies = jnp.repeat(w[:, None], num_experts, axis=1)
        if num_experts == 1:
            return copies
        return copies + noise * jax.random.normal(key, copies.shape, copies.dtype)

    return spread

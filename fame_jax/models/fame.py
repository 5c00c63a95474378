"""FAME (Liu, Zhang & Long, WSDM 2025, arXiv 2411.01457): facets by heads, preferences by experts.

FAME is SASRec with another last block; the paper says that it fits any model that attends, and here
is BERT4Rec's encoder with it too. Equation numbers are the paper's. Its score (eq. 11),

    P(v) = sum_h g_h (x_v W_f^h) . F^h = x_v . u,    u = sum_h g_h W_f^h F^h,

is linear in the item, so training, ranking and export use the one vector u and the plain item
table. `head_scores` is the long form, for explanation.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fame_jax import surgery
from fame_jax.batch import Batch
from fame_jax.models import views
from fame_jax.models.bert4rec import BidirectionalSASRec
from fame_jax.models.facet_block import BALANCE, FacetBlock
from fame_jax.models.sasrec import SASRec

Array = jax.Array


class FAME(SASRec):
    """SASRec whose last block is a FacetBlock."""

    num_experts: int
    routing: str
    active_experts: int
    attention_dropout: float
    attention: str
    remat: str
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
            self.routing,
            self.active_experts,
            self.dropout,
            self.attention_dropout,
            self.attention,
            self.remat,
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


class _Listener:
    """A model whose `apply` also hears the term that its facet block sows."""

    def __init__(self, module: FAME):
        self.module = module
        self.term: Array | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def apply(self, *arguments: Any, **options: Any) -> Any:
        """What the model's own `apply` returns."""
        out, sown = self.module.apply(*arguments, mutable=[BALANCE], **options)
        ((self.term,),) = jax.tree.leaves(sown, is_leaf=lambda x: isinstance(x, tuple))
        return out


def balanced(
    objective: Callable[..., tuple[Array, Array]],
    module: FAME,
    params: dict,
    batch: Batch,
    key: Array,
    *,
    balance_weight: float,
    **options: Any,
) -> tuple[Array, Array]:
    """An objective that calls `module.apply` once, and the experts' balance beside it.

    Args:
      objective: such as `objective.next_item`.
      module: with active_experts, or there is nothing to balance.
      params: its parameters.
      batch: fields [B, L].
      key: consumed by the objective.
      balance_weight: of `experts.balance` beside the objective's mean; 0: the objective alone.
      **options: the objective's own.

    Returns:
      The sum and the count of the objective, the weighted balance in the sum.
    """
    if not balance_weight:
        return objective(module, params, batch, key, **options)
    listener = _Listener(module)
    loss = objective(listener, params, batch, key, **options)
    return views.add_term(loss, (listener.term, jnp.float32(1)), balance_weight)


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

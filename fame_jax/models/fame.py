"""FAME (Liu, Zhang & Long, WSDM 2025, arXiv 2411.01457): facets by heads, preferences by experts.

FAME is SASRec with another last block. The paper says that it fits any attention-based model; here
it is also built on BERT4Rec's encoder. Equation numbers are the paper's. Its score (eq. 11),

    P(v) = sum_h g_h (x_v W_f^h) . F^h = x_v . u,    u = sum_h g_h W_f^h F^h,

is linear in the item vector, so training, ranking and export use the one vector u and the plain
item table.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from fame_jax.batch import Batch
from fame_jax.losses import LossOptions
from fame_jax.models import experts, surgery
from fame_jax.models.bert4rec import BERT4Rec, BidirectionalSASRec
from fame_jax.models.fame_block import FAMEBlock
from fame_jax.models.item_model import ItemModel
from fame_jax.models.objective import add_term, is_equal, target_loss
from fame_jax.models.options import Range, Weight
from fame_jax.models.sasrec import SASRec

Array = jax.Array


class FAME(SASRec):
    """SASRec whose last block is a `FAMEBlock`; its heads are the facets.

    Attributes:
      num_experts: N, experts of each head; 1 is FAME without mixture of experts.
      routing: the input of the router: 'outputs', what the experts attended to (eq. 16), or
        'inputs', the position's hidden state, which is known before they attend.
      active_experts: experts of a head used at a position, those of largest weight; 0: all. With
        routing by inputs the others do not attend, which saves their work.
      balance_weight: weight of the load-balancing loss, such as .01 (arXiv 2101.03961). If all
        experts are active, their mean weights take the place of the fractions of selections.
      remat: experts attend one after another, and again in the backward pass, so that memory holds
        the attention weights of one expert; on a CPU this is also faster if there are many experts.
      attention_residual: 'norm', x + f and LayerNorm, as in the backbone; 'slice', head h adds
        slice h of x; 'none', f alone (eqs. 7, 17).
      output_projection: W_O after the heads: 'drop', as in eqs. 15-17; 'keep', the backbone's,
        which mixes heads.
      facet_init: W_f starts as the selector of slice h of the item vector ('slices') or 'random'.
      gate_scale: gate weights are multiplied by H ('heads'), so that equal gates leave the slices
        as they are, or by 1 ('one').
      ffn_shared: one FFN' for all heads (section 4.2.3) or one for each (4.4.2).
      expert_init: after surgery, experts start as the pre-trained W_Q plus noise ('upcycle',
        Komatsuzaki et al., arXiv 2212.05055) or 'random'.
      expert_noise: standard deviation of that noise.
      head_loss: weight of the loss of each head by itself: the same loss with the head's own query
        W_f^h F^h in the place of u, the mean over heads. Each head predicts the next item in the
        paper too (section 4.2.3), but there only the gated sum is trained (eq. 18).
    """

    num_experts: Annotated[int, Range(1, 4096)] = 8
    routing: Literal['outputs', 'inputs'] = 'outputs'
    active_experts: Annotated[int, Range(0, 4096)] = 0
    balance_weight: Weight = 0.0
    remat: bool = False
    attention_residual: Literal['norm', 'slice', 'none'] = 'norm'
    output_projection: Literal['drop', 'keep'] = 'drop'
    facet_init: Literal['slices', 'random'] = 'slices'
    gate_scale: Literal['heads', 'one'] = 'heads'
    ffn_shared: bool = True
    expert_init: Literal['upcycle', 'random'] = 'upcycle'
    expert_noise: Annotated[float, Range(0, 10)] = 0.02
    head_loss: Weight = 0.0

    title: ClassVar[str] = 'FAME'
    backbone: ClassVar[type[ItemModel]] = SASRec
    # The FAME block of the paper read literally, section 4.4.2: all parameters that it does not
    # name as kept are new and random.
    readings: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        'paper': {
            'attention_residual': 'none',
            'output_projection': 'drop',
            'expert_init': 'random',
            'facet_init': 'random',
            'gate_scale': 'one',
        }
    }

    @nn.nowrap
    def block(self, index: int) -> nn.Module:
        """The backbone's block, and the FAME block as the last one."""
        if index < self.num_blocks - 1:
            return super().block(index)
        return FAMEBlock(
            settings=self.attention_settings(),
            num_experts=self.num_experts,
            routing=self.routing,
            active_experts=self.active_experts,
            remat=self.remat,
            attention_residual=self.attention_residual,
            output_projection=self.output_projection,
            facet_init=self.facet_init,
            gate_scale=self.gate_scale,
            ffn_shared=self.ffn_shared,
            name='facet_block',
        )

    def intermediates(
        self, tokens_BL: Array, positions_BL: Array, segments_BL: Array
    ) -> dict[str, Array]:
        """The parts of the last column's query, for rows that end with their history.

        Returns:
          gate_BH; head_BHD, each head's own query: their sum weighted by the gate is the query;
          router_BHN and attention_BHNL of the last column; positions_BLHN, the router at every
          position. float32.
        """
        u_BLD, intermediates = self.encode(tokens_BL, positions_BL, segments_BL)
        block = {name: x.astype(jnp.float32) for name, x in intermediates['facet_block'].items()}
        head_BHD = jnp.einsum('BHK,HDK->BHD', block['heads_BLHK'][:, -1], block['facet_HDK'])
        # The heads' parts are divided by the length of u too, so that they add up to the query.
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

    @nn.nowrap
    def facet_projections(self, params: Mapping[str, Any]) -> Array:
        """W_f of the FAME block (eq. 9), [H, D, K]."""
        return params['facet_block']['facet']

    @nn.nowrap
    def objective(
        self, params: dict, batch: Batch, key: Array, loss: LossOptions
    ) -> tuple[Array, Array, dict[str, Array]]:
        """The loss over items plus the weighted losses of the heads and of the experts' balance.

        Arguments and results are those of `ItemModel.objective`; with a `head_loss` there is the
        metric 'head_loss', with a `balance_weight` the metric 'balance'.
        """
        has_head_loss = not is_equal(self.head_loss, 0)
        item_key, head_key = jax.random.split(key) if has_head_loss else (key, key)
        total, weight, intermediates = self.item_loss(params, batch, item_key, loss)
        block, metrics = intermediates['facet_block'], {}
        if has_head_loss:
            term = self.loss_of_heads(params, block, batch, head_key, loss)
            total, metrics['head_loss'] = add_term(total, weight, term, self.head_loss)
        if not is_equal(self.balance_weight, 0):
            balance = experts.balance_loss(
                block['share_BLHN'],
                block['router_BLHN'],
                batch.segments_BL > 0,
                all_active=self.active_experts in (0, self.num_experts),
            )
            total, metrics['balance'] = add_term(total, weight, (balance, 1.0), self.balance_weight)
        return total, weight, metrics

    @nn.nowrap
    def loss_of_heads(
        self, params: dict, block: Mapping[str, Array], batch: Batch, key: Array, loss: LossOptions
    ) -> tuple[Array, Array]:
        """The loss of predicting the next item from each head alone.

        Args:
          params: the model's parameters.
          block: the intermediates of the FAME block in training.
          batch: fields [B, L].
          key: consumed, for negatives.
          loss: the loss over items.

        Returns:
          The weighted sum over heads and positions and its sum of weights, float32 scalars.
        """
        head_BHLD = jnp.einsum('BLHK,HDK->BHLD', block['heads_BLHK'], block['facet_HDK'])
        query_BHLD = self.comparable(head_BHLD, self.temperature)
        # A row of the batch for each head.
        rows = jax.tree.map(lambda x: jnp.repeat(x, self.num_heads, axis=0), batch)
        return target_loss(
            self,
            query_BHLD.reshape(-1, *query_BHLD.shape[2:]),
            params['item_table'],
            rows,
            key,
            loss,
            item_transform=self.item_transform,
        )

    @nn.nowrap
    def validate(self) -> None:
        """As `SASRec.validate`; options of the experts must have an effect together."""
        super().validate()
        if self.active_experts > self.num_experts:
            raise ValueError(
                f'active_experts={self.active_experts} is more than num_experts='
                f'{self.num_experts}; use 0 for all'
            )
        if self.balance_weight and self.num_experts == 1:
            raise ValueError(
                f'balance_weight={self.balance_weight} has no effect on a single expert; leave it '
                'out, or use more experts'
            )
        if self.expert_init == 'upcycle' and self.num_experts > 1 and self.expert_noise == 0:
            raise ValueError(
                'expert_noise=0 starts all experts of a head with the same parameters; use a small '
                'value such as 0.02'
            )

    @nn.nowrap
    def backbone_module(self) -> SASRec:
        """The backbone to pre-train, with the same values in the fields that both have."""
        names = {field.name for field in dataclasses.fields(self.backbone)} - {'parent', 'name'}
        return self.backbone(**{name: getattr(self, name) for name in names})

    @nn.nowrap
    def surgery_plan(self, key: Array) -> surgery.Plan:
        """The plan that turns the pre-trained backbone into this model (section 4.4.2).

        Args:
          key: consumed, for the experts' noise.
        """
        old, new = f'block_{self.num_blocks - 1}', 'facet_block'
        kept = ['key', 'value'] + (['key_bias', 'value_bias'] if self.attention_bias else [])
        if self.positions in ('relative', 'both'):
            kept.append('distance')
        if self.output_projection == 'keep':
            kept += ['output', 'output_bias']
        copy = {f'{new}/{name}': f'{old}/attention/{name}' for name in kept}
        if self.attention_residual == 'norm':
            copy |= {
                f'{new}/attention_norm/{name}': f'{old}/attention_norm/{name}'
                for name in ('scale', 'bias')
            }
        transform = {}
        if self.expert_init == 'upcycle':
            for name in ['query'] + (['query_bias'] if self.attention_bias else []):
                path, key = f'{new}/{name}', jax.random.fold_in(key, 1)
                copy[path] = f'{old}/attention/{name}'
                transform[path] = upcycle(key, self.num_experts, self.expert_noise)
        # The last two are BERT4Rec's output head; SASRec has none.
        dropped = f'{old}/', 'head/', 'item_bias'
        return surgery.Plan(copy=copy, transform=transform, fresh=f'{new}/', dropped=dropped)


class FAMEBERT4Rec(BidirectionalSASRec, FAME):
    """BERT4Rec's encoder with a FAMEBlock as its last block, trained on masked items.

    The block attends to both sides as the others do. The query u is multiplied with the item table
    itself, without the output head of BERT4Rec, which would break the collapse of eq. 11.
    """

    title: ClassVar[str] = 'FAME over BERT4Rec'
    backbone: ClassVar[type[ItemModel]] = BERT4Rec

    @nn.nowrap
    def validate(self) -> None:
        """As `FAME.validate`; the loss of heads is for the next item alone."""
        super().validate()
        if self.head_loss:
            raise ValueError(
                f'head_loss={self.head_loss} is not for {self.title}, which is trained on masked '
                'items; leave it out'
            )

    def intermediates(
        self, tokens_BL: Array, positions_BL: Array, segments_BL: Array
    ) -> dict[str, Array]:
        """As FAME's, at an appended [MASK]; attention to [MASK] itself is left out."""
        rows = self.append_mask(tokens_BL, positions_BL, segments_BL)
        parts = super().intermediates(*rows)
        return {
            **parts,
            'attention_BHNL': parts['attention_BHNL'][..., :-1],
            'positions_BLHN': parts['positions_BLHN'][:, :-1],
        }


def upcycle(key: Array, num_experts: int, noise: float) -> Callable[[Array], Array]:
    """A function [H, ...] -> [H, N, ...]: N copies, each with noise; a single one without."""

    def spread(w: Array) -> Array:
        copies = jnp.repeat(w[:, None], num_experts, axis=1)
        if num_experts == 1:
            return copies
        return copies + noise * jax.random.normal(key, copies.shape, copies.dtype)

    return spread

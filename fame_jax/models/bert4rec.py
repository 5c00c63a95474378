"""BERT4Rec (Sun et al., CIKM 2019, arXiv 1904.06690): masked items predicted from both sides.

    H = blocks(E[s] + P)                   each position attends to its whole history (eqs. 1-6)
    P(v) = softmax(GELU(h W^P + b^P) . E_v + b^O_v)                                   (eq. 7)
    L = sum over masked positions of -log P(the item that was there)                  (eq. 8)

The blocks are SASRec's, post-LayerNorm as in the paper; SSLRec's are pre-LayerNorm and its output
table is not tied. The authors' code also has a LayerNorm after the head's GELU, which eq. 7 does
not have. The bias of an item is a further coordinate of its vector, multiplied by a 1 in the query,
so that a score stays an inner product.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from fame_jax import losses
from fame_jax.batch import Batch
from fame_jax.losses import LossOptions
from fame_jax.models import layers
from fame_jax.models.objective import catalogue_loss
from fame_jax.models.options import Range, Rate, Share
from fame_jax.models.sasrec import MaskedSASRec

Array = jax.Array


class BidirectionalSASRec(MaskedSASRec):
    """The encoder: SASRec whose positions attend to later items of their history too.

    Rows hold the whole history, so there is one position more than in SASRec. To predict what
    follows a history (`last`), a [MASK] is appended after its last item. Dropout, absolute
    positions and the inner product are those of SSLRec's bert4rec.yml and of the paper.

    Attributes:
      positions: a table by position from the history's 'start', or from its 'end', so that the
        [MASK] to predict has one position for histories of any length (RecBoard's rows, padded on
        the left).
      mask_prob: probability of each item to be selected for prediction.
      mask_share: share of the selected items that become [MASK]; half of the others become a random
        item, half stay. The default is BERT's (Devlin et al. 2019, arXiv 1810.04805), as in SSLRec;
        the authors' code has it too, but replaces all by default (1), as RecBole and RecBoard do.
      last_share: probability that a history has its last item alone selected, in place of the draw
        by mask_prob: the samples that the paper adds; RecBole's ft_ratio, there .5.
    """

    similarity: Literal['cosine', 'dot'] = 'dot'
    dropout: Rate = 0.1
    positions: Literal['start', 'end'] = 'start'
    mask_prob: Annotated[float, Range(0.001, 1)] = 0.2
    mask_share: Share = 0.8
    last_share: Share = 0.0

    row_layout: ClassVar[str] = 'masked'
    causal: ClassVar[bool] = False
    shardable_items: ClassVar[bool] = False
    losses: ClassVar[tuple[str, ...]] = ('ce',)
    # An epoch predicts a fifth of the items, so there are five times as many epochs, and five times
    # the patience.
    recipe: ClassVar[Mapping[str, Any]] = {
        'pretrain_epochs': 300,
        'finetune_epochs': 300,
        'patience': 25,
    }

    @nn.nowrap
    def num_positions(self) -> int:
        """Rows of the position table."""
        return self.max_length + 1

    @nn.nowrap
    def attention_mask(self, segments_BL: Array) -> Array:
        """Every position attends to its whole history; bool [B, Q, S]."""
        earlier_BLL = super().attention_mask(segments_BL)
        return earlier_BLL | earlier_BLL.swapaxes(1, 2)

    def encode(
        self,
        tokens_BL: Array,
        positions_BL: Array,
        segments_BL: Array,
        *,
        train: bool = False,
        last: bool = False,
    ) -> tuple[Array, dict[str, dict[str, Array]]]:
        """As SASRec's; `last` appends a column of [MASK] and computes that column."""
        if last:
            rows = self.append_mask(tokens_BL, positions_BL, segments_BL)
            tokens_BL, positions_BL, segments_BL = rows
        if self.positions == 'end':
            positions_BL = layers.attention_mask(segments_BL).sum(axis=1, dtype=jnp.int32) - 1
            positions_BL = jnp.maximum(positions_BL, 0)  # of padding
        return super().encode(tokens_BL, positions_BL, segments_BL, train=train, last=last)

    def append_mask(
        self, tokens_BL: Array, positions_BL: Array, segments_BL: Array
    ) -> tuple[Array, Array, Array]:
        """The rows with [MASK] after their last item.

        If that makes more columns than there are positions, the earliest columns are cut off.
        """
        real_B1 = segments_BL[:, -1:] > 0
        mask_B1 = jnp.full_like(tokens_BL[:, -1:], self.mask_id)
        # The row of an empty history is [MASK] alone.
        position_B1 = jnp.where(real_B1, positions_BL[:, -1:] + 1, 0)
        segment_B1 = jnp.where(real_B1, segments_BL[:, -1:], 1)
        over_B1 = jnp.maximum(position_B1 - self.max_length, 0)
        columns = (tokens_BL, mask_B1), (positions_BL, position_B1), (segments_BL, segment_B1)
        tokens_BL, positions_BL, segments_BL = (
            jnp.concatenate(pair, axis=1)[:, -self.num_positions() :] for pair in columns
        )
        return tokens_BL, jnp.maximum(positions_BL - over_B1, 0), segments_BL

    @nn.nowrap
    def item_loss(
        self, params: dict, batch: Batch, key: Array, loss: LossOptions
    ) -> tuple[Array, Array, Any]:
        """The loss of predicting masked items, `masked_item_loss`."""
        return masked_item_loss(self, params, batch, key, loss)


class BERT4Rec(BidirectionalSASRec):
    """The encoder and the output head of eq. 7."""

    title: ClassVar[str] = 'BERT4Rec'
    row_wise_items: ClassVar[bool] = False

    def setup(self) -> None:
        super().setup()
        self.head = nn.Dense(self.width, kernel_init=layers.normal_init, dtype=self.dtype)
        self.item_bias = self.param('item_bias', nn.initializers.zeros, (self.num_items + 1,))

    def __call__(
        self,
        tokens_BL: Array,
        positions_BL: Array,
        segments_BL: Array,
        *,
        train: bool = False,
        last: bool = False,
    ) -> tuple[Array, dict[str, dict[str, Array]]]:
        """Encodes histories as SASRec does; queries are [B, L, D + 1], their last entry is 1.

        With `last`, the intermediates have one column more than the rows, that of [MASK].
        """
        h_BLD, intermediates = self.encode(
            tokens_BL, positions_BL, segments_BL, train=train, last=last
        )
        query_BLD = self.comparable(nn.gelu(self.head(h_BLD)), self.temperature)
        one_BL1 = jnp.ones_like(query_BLD[..., :1])
        return jnp.concatenate([query_BLD, one_BL1], axis=-1), intermediates

    def item_vectors(self, *, train: bool = False) -> Array:
        """The item vectors, [V + 1, D + 1], with each item's bias as the last entry."""
        item_VD = super().item_vectors(train=train)
        return jnp.concatenate([item_VD, self.item_bias[:, None].astype(self.dtype)], axis=1)


def masked_item_loss(
    module: BidirectionalSASRec, params: dict, batch: Batch, key: Array, loss: LossOptions
) -> tuple[Array, Array, Any]:
    """The cross-entropy of predicting the masked items over the whole catalogue (eq. 8).

    Args:
      module: a bidirectional model.
      params: its parameters.
      batch: fields [B, L]; rows hold whole histories, whose items are their own targets.
      key: consumed, for the masks and for dropout.
      loss: `chunk_tokens` masked positions at a time (0: all positions of the batch at once,
        masked or not), `chunk_items` items at a time.

    Returns:
      The sum over masked positions and their number, float32 scalars, and the model's
      intermediates.
    """
    mask_key, dropout_key = jax.random.split(key)
    tokens_BL, masked_BL = mask_items(
        mask_key,
        batch.tokens_BL,
        batch.segments_BL,
        prob=module.mask_prob,
        num_items=module.num_items,
        mask_id=module.mask_id,
        mask_share=module.mask_share,
        last_share=module.last_share,
    )
    query_BLD, item_VD, intermediates = module.apply(
        {'params': params},
        tokens_BL,
        batch.positions_BL,
        batch.segments_BL,
        train=True,
        rngs={'dropout': dropout_key},
        method='forward',
    )
    # Masked positions come first; chunks without one are skipped.
    order_T = jnp.argsort(~masked_BL.reshape(-1))
    total, weight = catalogue_loss(
        query_BLD.reshape(-1, query_BLD.shape[-1])[order_T],
        item_VD,
        batch.targets_BL.reshape(-1)[order_T],
        masked_BL.reshape(-1)[order_T].astype(jnp.float32),
        loss=loss,
        num_items=module.num_items,
        num_tokens=jnp.sum(masked_BL, dtype=jnp.int32),
    )
    return total, weight, intermediates


def mask_items(
    key: Array,
    tokens_BL: Array,
    segments_BL: Array,
    *,
    prob: float,
    num_items: int,
    mask_id: int,
    mask_share: float = 0.8,
    last_share: float = 0.0,
) -> tuple[Array, Array]:
    """Selects items for prediction, of which some become [MASK], some a random item, some stay.

    In a history without a selected item the last one is selected and becomes [MASK]. The model so
    also learns the case that ranking needs; the paper adds samples with a masked last item.

    Args:
      key: consumed.
      tokens_BL: int32 items, 0 for padding.
      segments_BL: int32, which history of the row, 0 for padding.
      prob: probability of each item to be selected.
      num_items: V; random items are drawn from 1..V and may equal the one they replace.
      mask_id: the id of [MASK].
      mask_share, last_share: as in `BidirectionalSASRec`.

    Returns:
      tokens_BL as the model reads them, and bool masked_BL, the selected positions.
    """
    draw_key, kind_key, item_key = jax.random.split(key, 3)
    last_key = jax.random.fold_in(key, 3)
    shape_BL = tokens_BL.shape
    drawn_BL = jax.random.bernoulli(draw_key, prob, shape_BL) & (segments_BL > 0)
    earlier_BLL = layers.attention_mask(segments_BL)
    # In the causal mask, a history's last item is attended to by itself alone.
    last_BL = earlier_BLL.sum(axis=1) == 1
    if last_share:
        alone_BL = last_BL & jax.random.bernoulli(last_key, last_share, shape_BL)
        drawn_BL &= ~(earlier_BLL & alone_BL[:, :, None]).any(axis=1)  # all of their histories
    forced_BL = last_BL & ~(earlier_BLL & drawn_BL[:, None, :]).any(axis=2)
    kind_BL = jax.random.uniform(kind_key, shape_BL)
    mask_BL = forced_BL | (drawn_BL & (kind_BL < mask_share))
    random_BL = drawn_BL & ~mask_BL & (kind_BL < (1 + mask_share) / 2)
    item_BL = losses.draw_negatives(item_key, shape_BL, num_items)
    tokens_BL = jnp.where(random_BL, item_BL, jnp.where(mask_BL, mask_id, tokens_BL))
    return tokens_BL, drawn_BL | forced_BL

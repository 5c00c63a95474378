"""BERT4Rec (Sun et al., CIKM 2019, arXiv 1904.06690): items guessed from both their sides.

    H = blocks(E[s] + P)                   each position sees all of its history     (eqs. 1-6)
    P(v) = softmax(GELU(h W^P + b^P) . E_v + b^O_v)                                  (eq. 7)
    L = sum over hidden positions of -log P(the item that was there)                 (eq. 8)

The blocks are SASRec's, post-LayerNorm, as the paper's; SSLRec's are pre-LayerNorm and its output
table is not tied. The authors' code also has a LayerNorm behind the head's GELU, which eq. 7 has
not. The bias of an item is one more coordinate of its vector, beside a 1 of the query, so that a
score stays an inner product.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from fame_jax import losses
from fame_jax.batch import Batch
from fame_jax.models import layers
from fame_jax.models.sasrec import MaskedSASRec

Array = jax.Array

# Of hidden positions, those that read [MASK] and those that read an item drawn at random; the rest
# keep theirs. BERT's shares (Devlin et al. 2019, arXiv 1810.04805), taken over by SSLRec; the
# authors' code has them too, but hides all behind [MASK] by default.
MASKED_SHARE, RANDOM_SHARE = 0.8, 0.1


class BidirectionalSASRec(MaskedSASRec):
    """The encoder: SASRec whose positions see the later items of their history too.

    Rows hold the whole history, so there is a position more than SASRec's. What comes after a
    history is asked (`last`) by a [MASK] behind its last item.
    """

    def num_positions(self) -> int:
        """Rows of the position table."""
        return self.max_length + 1

    def visible(self, segments_BL: Array) -> Array:
        """What a position may look at: all of its own history; bool [B, Q, S]."""
        earlier_BLL = super().visible(segments_BL)
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
        """As SASRec's; `last` appends a column and asks there."""
        rows = tokens_BL, positions_BL, segments_BL
        return super().encode(*(self.ask(*rows) if last else rows), train=train, last=last)

    def ask(
        self, tokens_BL: Array, positions_BL: Array, segments_BL: Array
    ) -> tuple[Array, Array, Array]:
        """Rows with [MASK] behind their last item.

        Where that makes more columns than there are positions, the earliest are dropped.
        """
        real_B1 = segments_BL[:, -1:] > 0
        mask_B1 = jnp.full_like(tokens_BL[:, -1:], self.mask_id)
        # Of an empty history [MASK] is all there is.
        position_B1 = jnp.where(real_B1, positions_BL[:, -1:] + 1, 0)
        segment_B1 = jnp.where(real_B1, segments_BL[:, -1:], 1)
        over_B1 = jnp.maximum(position_B1 - self.max_length, 0)
        columns = (tokens_BL, mask_B1), (positions_BL, position_B1), (segments_BL, segment_B1)
        tokens_BL, positions_BL, segments_BL = (
            jnp.concatenate(pair, axis=1)[:, -self.num_positions() :] for pair in columns
        )
        return tokens_BL, jnp.maximum(positions_BL - over_B1, 0), segments_BL


class BERT4Rec(BidirectionalSASRec):
    """The encoder and the head of eq. 7."""

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
        """Encodes histories, as SASRec's call; queries are [B, L, D + 1], their last entry 1.

        With `last`, the intermediates have a column more than the rows: [MASK]'s.
        """
        h_BLD, out = self.encode(tokens_BL, positions_BL, segments_BL, train=train, last=last)
        h_BLD = layers.ACTIVATIONS[self.activation](self.head(h_BLD))
        query_BLD = self.comparable(h_BLD, self.temperature)
        return jnp.concatenate([query_BLD, jnp.ones_like(query_BLD[..., :1])], axis=-1), out

    def item_vectors(self, *, train: bool = False) -> Array:
        """What queries are multiplied with, [V + 1, D + 1]: an item's vector and its bias."""
        item_VD = super().item_vectors(train=train)
        return jnp.concatenate([item_VD, self.item_bias[:, None].astype(self.dtype)], axis=1)


def cloze(
    module: BidirectionalSASRec,
    params: dict,
    batch: Batch,
    key: Array,
    *,
    cloze_rate: float,
    chunk_tokens: int,
    chunk_items: int,
) -> tuple[Array, Array]:
    """The cross-entropy of guessing hidden items, over the whole catalogue (eq. 8).

    Args:
      module: a model with `query_and_items` and a `mask_id`.
      params: its parameters.
      batch: fields [B, L]; rows hold whole histories, whose items are their own targets.
      key: consumed, for what is hidden and for dropout.
      cloze_rate: see `hide`.
      chunk_tokens: hidden positions at a time; 0: every position at once, hidden or not.
      chunk_items: items at a time; 0: all.

    Returns:
      The sum over hidden positions and their number, float32 scalars.
    """
    hide_key, dropout_key = jax.random.split(key)
    tokens_BL, hidden_BL = hide(
        hide_key,
        batch.tokens_BL,
        batch.segments_BL,
        rate=cloze_rate,
        num_items=module.num_items,
        mask_id=module.mask_id,
    )
    query_BLD, item_VD = module.apply(
        {'params': params},
        tokens_BL,
        batch.positions_BL,
        batch.segments_BL,
        train=True,
        rngs={'dropout': dropout_key},
        method='query_and_items',
    )
    # The few positions that count come first, and the others are never multiplied.
    order_T = jnp.argsort(~hidden_BL.reshape(-1))
    return losses.chunked_cross_entropy(
        query_BLD.reshape(-1, query_BLD.shape[-1])[order_T],
        item_VD,
        batch.targets_BL.reshape(-1)[order_T],
        hidden_BL.reshape(-1)[order_T].astype(jnp.float32),
        chunk_tokens=chunk_tokens,
        chunk_items=chunk_items,
        num_tokens=jnp.sum(hidden_BL, dtype=jnp.int32),
    )


def hide(
    key: Array,
    tokens_BL: Array,
    segments_BL: Array,
    *,
    rate: float,
    num_items: int,
    mask_id: int,
) -> tuple[Array, Array]:
    """Hides items: 80 % of them behind [MASK], 10 % behind a random item, 10 % stay to be seen.

    Of a history in which no item was drawn, the last is hidden, always behind [MASK]. So that is
    learnt too which is asked later; the paper has samples of that kind beside the drawn ones.

    Args:
      key: consumed.
      tokens_BL: int32 items, 0 for padding.
      segments_BL: int32, which history of the row, 0 for padding.
      rate: of each item, the probability to be drawn.
      num_items: V; random items are drawn from 1..V, with the hidden one among them.
      mask_id: the id of [MASK].

    Returns:
      tokens_BL as the model reads them, and hidden_BL, bool.
    """
    draw_key, kind_key, item_key = jax.random.split(key, 3)
    shape_BL = tokens_BL.shape
    drawn_BL = jax.random.bernoulli(draw_key, rate, shape_BL) & (segments_BL > 0)
    earlier_BLL = layers.visible(segments_BL)
    # The last item of a history is seen by itself alone, and itself sees all.
    last_BL = earlier_BLL.sum(axis=1) == 1
    forced_BL = last_BL & ~(earlier_BLL & drawn_BL[:, None, :]).any(axis=2)
    kind_BL = jax.random.uniform(kind_key, shape_BL)
    masked_BL = forced_BL | (drawn_BL & (kind_BL < MASKED_SHARE))
    random_BL = drawn_BL & ~masked_BL & (kind_BL < MASKED_SHARE + RANDOM_SHARE)
    item_BL = losses.draw_negatives(item_key, shape_BL, num_items)
    tokens_BL = jnp.where(random_BL, item_BL, jnp.where(masked_BL, mask_id, tokens_BL))
    return tokens_BL, drawn_BL | forced_BL

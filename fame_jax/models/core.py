"""CORE (Hou et al., SIGIR 2022, arXiv 2204.11067), the variant with a Transformer.

Queries and items live in one space, since a query is a weighted mean of item vectors:

    x_i = drop(E[s_i])    alpha = softmax over the prefix of w . Transformer(x + P)
    h = sum_i alpha_i x_i                  score(v) = cos(h, drop(E[v])) / temperature

The Transformer is SASRec's and gives only the weights; it is causal, as in the authors' code. The
weights of a shorter prefix are then a softmax of the same logits over fewer of them, and one pass
gives the queries of all prefixes of a packed row; the authors' code runs each prefix by itself. The
bias that their code adds to every logit cancels in the softmax and is left out. They draw the item
table from U(-1 / sqrt(D), 1 / sqrt(D)); here it starts as in all models, N(0, 0.02).

Since h is a mix of the history's own items, it is nearest to them: the history is ranked above the
item that follows. In data where no user has an item twice, unmasked figures measure little else;
the masked figures are the meaningful ones.
"""

from typing import ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from fame_jax.models import layers
from fame_jax.models.options import Rate
from fame_jax.models.sasrec import SASRec

Array = jax.Array


class CORE(SASRec):
    """SASRec's encoder as the weights of a mean over the item embeddings.

    Attributes:
      item_dropout: rate, on item embeddings and on item vectors.
    """

    positions: Literal['relative', 'start', 'both'] = 'start'
    item_dropout: Rate = 0.2

    title: ClassVar[str] = 'CORE'
    shardable_items: ClassVar[bool] = False
    row_wise_items: ClassVar[bool] = False

    def setup(self) -> None:
        super().setup()
        self.drop_items = layers.Dropout(self.item_dropout)
        self.importance = nn.Dense(
            1, use_bias=False, kernel_init=layers.normal_init, dtype=self.dtype
        )

    def encode(
        self,
        tokens_BL: Array,
        positions_BL: Array,
        segments_BL: Array,
        *,
        train: bool = False,
        last: bool = False,
    ) -> tuple[Array, dict[str, dict[str, Array]]]:
        """The weighted mean of each prefix, in place of SASRec's last block.

        The intermediates also have the weights of the mean, {'mean': {'weight_BQS'}}, float32; Q is
        1 if `last`.
        """
        x_BLD = self.drop_items(self.embed_items(tokens_BL), train=train)
        h_BLD, intermediates = self.transform(
            x_BLD, positions_BL, segments_BL, train=train, last=False
        )
        mask_BLL = self.attention_mask(segments_BL)
        logit_BL = self.importance(h_BLD)[..., 0]
        weight_BQS = prefix_softmax(logit_BL, mask_BLL[:, -1:] if last else mask_BLL)
        intermediates['mean'] = {'weight_BQS': weight_BQS}
        x_BSD = x_BLD.astype(self.dtype)
        return jnp.einsum('BQS,BSD->BQD', weight_BQS.astype(self.dtype), x_BSD), intermediates

    def item_vectors(self, *, train: bool = False) -> Array:
        """The item vectors; if `train`, with entries dropped before they get unit length."""
        item_VD = super().item_vectors(train=train)
        if not train:
            return item_VD
        # The vector already has unit length; dropout and a second scaling give the same result as
        # dropout of the row and one scaling.
        return self.comparable(self.drop_items(item_VD, train=train))


def prefix_softmax(logit_BL: Array, mask_BQS: Array) -> Array:
    """The softmax of a row's logits over the positions of each mask; float32 [B, Q, S]."""
    logit_B1S = logit_BL.astype(jnp.float32)[:, None]
    return jax.nn.softmax(jnp.where(mask_BQS, logit_B1S, layers.MASKED), axis=-1)

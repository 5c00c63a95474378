"""CORE (Hou et al., SIGIR 2022, arXiv 2204.11067), the variant with a Transformer.

Queries and items live in one space, since a query is a weighted mean of item vectors:

    x_i = drop(E[s_i])    alpha = softmax over the prefix of w . Transformer(x + P)
    h = sum_i alpha_i x_i                  score(v) = cos(h, drop(E[v])) / temperature

The Transformer is SASRec's, and only weighs; it looks at earlier items alone, as in the authors'
code. So the weights of a shorter prefix are a softmax of the same logits over fewer of them, and
one pass gives the queries of all prefixes of a packed row, where the code runs each by itself. The
bias that the code adds to every logit falls out of the softmax and is left out. The code draws the
item table from U(-1 / sqrt(D), 1 / sqrt(D)); here it begins like every other's, N(0, 0.02).

Since h is a mix of the history's own items, those are what it is nearest to: the history stands on
top of the ranking of the whole catalogue, before the item that follows. Where no user meets an item
twice, unmasked figures measure that and little else; the masked ones are those that mean something.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from fame_jax.models import layers
from fame_jax.models.sasrec import SASRec

Array = jax.Array


class CORE(SASRec):
    """SASRec's encoder as the weights of a mean over the items that it reads."""

    item_dropout: float

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
        """The mean of each prefix before it is made comparable; otherwise as a call.

        The named intermediates have the weights of the mean too, {'mean': {'weight_BQS'}},
        float32; Q is 1 if `last`.
        """
        x_BLD = self.drop_items(self.read(tokens_BL), train=train)
        h_BLD, out = self.transform(x_BLD, positions_BL, segments_BL, train=train, last=False)
        mask_BLL = self.visible(segments_BL)
        logit_BL = self.importance(h_BLD)[..., 0]
        weight_BQS = prefix_softmax(logit_BL, mask_BLL[:, -1:] if last else mask_BLL)
        out['mean'] = {'weight_BQS': weight_BQS}
        x_BSD = x_BLD.astype(self.dtype)
        return jnp.einsum('BQS,BSD->BQD', weight_BQS.astype(self.dtype), x_BSD), out

    def item_vectors(self, *, train: bool = False) -> Array:
        """As every model's, but with entries dropped where `train` is true."""
        item_VD = super().item_vectors(train=train)
        if not train:
            return item_VD
        # The length that a vector had before does not matter to the one it gets now.
        return self.comparable(self.drop_items(item_VD, train=train))


def prefix_softmax(logit_BL: Array, mask_BQS: Array) -> Array:
    """The softmax of one row of logits over what each position sees; float32 [B, Q, S]."""
    logit_B1S = logit_BL.astype(jnp.float32)[:, None]
    return jax.nn.softmax(jnp.where(mask_BQS, logit_B1S, layers.MASKED), axis=-1)

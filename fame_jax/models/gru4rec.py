"""GRU4Rec (Hidasi et al., ICLR 2016, arXiv 1511.06939), in RecBole's form.

With x a history's items after dropout, G the width of the state, and J = 3G, the gates r, z and the
candidate n next to each other:

    r = s(x W_r + h U_r)    z = s(x W_z + h U_z)    n = tanh(x W_n + r * (h U_n))
    h' = (1 - z) * n + z * h                         query = h' W_o + b

without other biases. The gates have the form of cuDNN and PyTorch; in the paper r multiplies h
before U_n. As in RecBole (which follows Tan et al., DLRS 2016, arXiv 1606.08117) scores use the
input item table, and the softmax is over the catalogue; the paper has one-hot inputs, an output
matrix of its own, and TOP1 or BPR over the other items of a batch.

RecBole trains on every prefix by itself. A state depends on its prefix alone, so here one pass over
a history gives all its prefixes; the state is reset where the next history of a row begins.
"""

from typing import ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from fame_jax.models import layers
from fame_jax.models.item_model import ItemModel
from fame_jax.models.options import Rate, Width

Array = jax.Array

xavier_init = nn.initializers.xavier_uniform()

# U(-1 / sqrt(G), 1 / sqrt(G)), PyTorch's default, which RecBole keeps.
output_init = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


class GRU4Rec(ItemModel):
    """A recurrent state over a history's items; a query is an affine map of the state.

    The defaults are those of RecBole's GRU4Rec.yaml.

    Attributes:
      hidden_width: G, width of the state.
      dropout: rate, on item embeddings.
    """

    similarity: Literal['cosine', 'dot'] = 'dot'
    hidden_width: Width = 128
    dropout: Rate = 0.3

    title: ClassVar[str] = 'GRU4Rec'
    shardable_items: ClassVar[bool] = True

    def setup(self) -> None:
        super().setup()
        self.input_dropout = layers.Dropout(self.dropout)
        gates = 3 * self.hidden_width
        self.input_kernel = self.param('input_kernel', xavier_init, (self.width, gates))
        self.state_kernel = self.param('state_kernel', xavier_init, (self.hidden_width, gates))
        self.output = nn.Dense(self.width, kernel_init=output_init, dtype=self.dtype)

    def __call__(
        self,
        tokens_BL: Array,
        positions_BL: Array,
        segments_BL: Array,
        *,
        train: bool = False,
        last: bool = False,
    ) -> tuple[Array, dict[str, dict[str, Array]]]:
        """Encodes histories.

        Args:
          tokens_BL: int32 items, 0 for padding.
          positions_BL: not used; the state follows the order of the columns.
          segments_BL: int32, which history of the row, 0 for padding.
          train: whether to apply dropout; needs the rng 'dropout'.
          last: compute the last column alone, for rows that end with their history.

        Returns:
          query_BLD, or [B, 1, D] if `last`, and the states of the same columns,
          {'gru': {'state_BLG'}}.
        """
        x_BLD = self.input_dropout(self.embed_items(tokens_BL).astype(self.dtype), train=train)
        input_BLJ = jnp.einsum('BLD,DJ->BLJ', x_BLD, self.input_kernel.astype(self.dtype))
        kernel_GJ = self.state_kernel.astype(self.dtype)
        state_BLG = recur(input_BLJ, kernel_GJ, same_history(segments_BL))
        state_BLG = state_BLG[:, -1:] if last else state_BLG
        query_BLD = self.comparable(self.output(state_BLG), self.temperature)
        return query_BLD, {'gru': {'state_BLG': state_BLG}}


def same_history(segments_BL: Array) -> Array:
    """Whether a position continues the history of the position before it; bool [B, L].

    False in the first column, between two histories, and where padding begins or ends.
    """
    before_BL = jnp.pad(segments_BL[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return segments_BL == before_BL


def recur(input_BLJ: Array, kernel_GJ: Array, same_BL: Array) -> Array:
    """The states of a GRU without biases, from zeros at the start of each history.

    Args:
      input_BLJ: x W of all positions; r, z and n next to each other.
      kernel_GJ: U, in the same order.
      same_BL: bool, False where the previous state is dropped.

    Returns:
      state_BLG after each position, in the dtype of the input.
    """

    def step(state_BG: Array, column: tuple[Array, Array]) -> tuple[Array, Array]:
        input_BJ, same_B = column
        before_BG = jnp.where(same_B[:, None], state_BG, 0)
        reset_BG, update_BG, input_BG = jnp.split(input_BJ, 3, axis=-1)
        from_reset_BG, from_update_BG, from_state_BG = jnp.split(before_BG @ kernel_GJ, 3, axis=-1)
        reset_BG = jax.nn.sigmoid(reset_BG + from_reset_BG)
        update_BG = jax.nn.sigmoid(update_BG + from_update_BG)
        candidate_BG = jnp.tanh(input_BG + reset_BG * from_state_BG)
        after_BG = candidate_BG + update_BG * (before_BG - candidate_BG)
        return after_BG, after_BG

    start_BG = jnp.zeros((input_BLJ.shape[0], kernel_GJ.shape[0]), input_BLJ.dtype)
    columns = (jnp.moveaxis(input_BLJ, 1, 0), same_BL.T)
    _, state_LBG = jax.lax.scan(step, start_BG, columns)
    return jnp.moveaxis(state_LBG, 0, 1)

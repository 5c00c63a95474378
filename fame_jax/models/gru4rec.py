"""GRU4Rec (Hidasi et al., ICLR 2016, arXiv 1511.06939), in RecBole's form.

With x a history's items after dropout, and G the width of the state, beside the letters of
`batch.py`; J = 3G, the gates r, z and the candidate n side by side:

    r = s(x W_r + h U_r)    z = s(x W_z + h U_z)    n = tanh(x W_n + r * (h U_n))
    h' = (1 - z) * n + z * h                         query = h' W_o + b

without other biases. This is the gates' form of cuDNN and PyTorch; in the paper r multiplies h
before U_n. As in RecBole (which follows Tan et al., DLRS 2016, arXiv 1606.08117) a query meets the
item table that is read from, and the softmax is over the catalogue; the paper has one-hot inputs,
an output matrix of its own, and TOP1 or BPR over the other items of a batch.

RecBole trains on every prefix by itself. A state knows its prefix alone, so here the prefixes of a
history come from one pass over it, and the state is forgotten where a row's next history begins.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from fame_jax.models import layers
from fame_jax.models.items import ItemModel

Array = jax.Array

xavier_init = nn.initializers.xavier_uniform()

# U(-1 / sqrt(G), 1 / sqrt(G)), which RecBole leaves as PyTorch draws it.
output_init = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


class GRU4Rec(ItemModel):
    """A recurrent state that reads a history item by item; a query is an affine map of it."""

    hidden_width: int  # G
    dropout: float

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
          positions_BL: not looked at, a state knows the order by itself.
          segments_BL: int32, which history of the row, 0 for padding.
          train: whether to drop out; wants the rng 'dropout'.
          last: ask for the last column alone, for rows that end with their history.

        Returns:
          query_BLD, or [B, 1, D] if `last`; and the states of the same columns,
          {'gru': {'state_BLG'}}.
        """
        x_BLD = self.input_dropout(self.read(tokens_BL).astype(self.dtype), train=train)
        input_BLJ = jnp.einsum('BLD,DJ->BLJ', x_BLD, self.input_kernel.astype(self.dtype))
        kernel_GJ = self.state_kernel.astype(self.dtype)
        state_BLG = recur(input_BLJ, kernel_GJ, same_history(segments_BL))
        asked_BQG = state_BLG[:, -1:] if last else state_BLG
        query_BQD = self.comparable(self.output(asked_BQG), self.temperature)
        return query_BQD, {'gru': {'state_BLG': asked_BQG}}


def same_history(segments_BL: Array) -> Array:
    """Whether a position goes on with the history of the one before it; bool [B, L].

    False in the first column, at every border of two histories, and where padding begins or ends.
    """
    before_BL = jnp.pad(segments_BL[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return segments_BL == before_BL


def recur(input_BLJ: Array, kernel_GJ: Array, same_BL: Array) -> Array:
    """The states of a GRU without biases, from zeros at the beginning of each history.

    Args:
      input_BLJ: x W of all positions; r, z and n side by side.
      kernel_GJ: U, likewise.
      same_BL: bool, False where the state before is forgotten.

    Returns:
      state_BLG, after each position, in the dtype of the input.
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

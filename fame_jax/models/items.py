"""The items' side of every model: the table that is read, the vectors that queries meet."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fame_jax.models import layers
from fame_jax.sharding import table_rows

Array = jax.Array


class ItemModel(nn.Module):
    """A model of histories whose scores are inner products of queries and item vectors.

    A history has one query or several; `combine` makes one score of theirs. So any slice of the
    catalogue can be scored by itself: in chunks, on another device, in a served index.
    """

    num_items: int  # V
    width: int
    similarity: str
    temperature: float
    tied_items: bool
    item_training: str
    dtype: Any
    # That shares the tables by items.
    mesh: jax.sharding.Mesh | None = dataclasses.field(default=None, kw_only=True)

    def setup(self) -> None:
        shape_VD = (table_rows(self.num_items, self.mesh), self.width)
        if self.item_training != 'frozen':
            self.item_table = self.param('item_table', layers.normal_init, shape_VD)
        if self.item_training != 'trained':
            self.frozen_table = self.param('frozen_table', layers.normal_init, shape_VD)
        if not self.tied_items:
            self.output_table = self.param('output_table', layers.normal_init, shape_VD)

    def read(self, items: Any) -> Array:
        """Rows of the table that items are read from; the frozen part has no gradient."""
        if self.item_training == 'trained':
            return self.item_table[items]
        row = jax.lax.stop_gradient(self.frozen_table)[items]
        return row if self.item_training == 'frozen' else row + self.item_table[items]

    def item_rows(self) -> Array:
        """The table behind the item vectors as it is kept, [V + 1, D] by item id."""
        return self.read(...) if self.tied_items else self.output_table

    def vectors_of(self, row_VD: Array) -> Array:
        """The vectors of some rows of that table, each by itself."""
        return self.comparable(row_VD.astype(self.dtype))

    def item_vectors(self, *, train: bool = False) -> Array:
        """What queries are multiplied with, [V + 1, D] by item id; row 0 is the padding's.

        A model that drops parts of its candidates does so where `train` is true.
        """
        return self.vectors_of(self.item_rows())

    def has_plain_items(self) -> bool:
        """Whether item vectors are `vectors_of` rows in training too, and nothing else."""
        return type(self).item_vectors is ItemModel.item_vectors

    def query_and_items(self, *arguments: Any, train: bool = False, **options: Any) -> Any:
        """Both sides of the score from one call."""
        return self(*arguments, train=train, **options)[0], self.item_vectors(train=train)

    def query_and_rows(self, *arguments: Any, train: bool = False, **options: Any) -> Any:
        """The queries, and the rows that `vectors_of` makes item vectors of, some at a time."""
        return self(*arguments, train=train, **options)[0], self.item_rows()

    @staticmethod
    def combine(score_BQV: Array) -> Array:
        """The score of each item, [B, V], from those of a history's queries; here there is one."""
        return score_BQV[:, 0]

    def comparable(self, x: Array, temperature: float = 1.0) -> Array:
        """Unit length over temperature where similarity is the cosine; as it is for the dot."""
        if self.similarity == 'dot':
            return x
        return unit(x, temperature)


def unit(x: Array, temperature: float = 1.0) -> Array:
    """Length 1 / temperature over the last axis; a row of zeros stays one, without a gradient."""
    x32 = x.astype(jnp.float32)
    # Under the root, so that the gradient of a row of zeros is zero and not NaN.
    inverse = jax.lax.rsqrt(jnp.sum(x32 * x32, axis=-1, keepdims=True) + 1e-12)
    return (x32 * (inverse / temperature)).astype(x.dtype)

"""The base class of all models: the item table, the score, and the facts a class states."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from fame_jax.batch import Batch
from fame_jax.losses import LossOptions
from fame_jax.models import layers, options
from fame_jax.models.objective import next_item_loss
from fame_jax.parallel.mesh import table_rows

Array = jax.Array


class ItemModel(nn.Module):
    """A model of histories whose scores are inner products of queries and item vectors.

    A history has one query or several; `combine` turns the scores of several queries into one. Any
    part of the catalogue can therefore be scored by itself: in chunks, on another device, or in a
    search index.

    A subclass defines `setup` and `__call__`; its options are its fields, each with a default. The
    class attributes below state facts that the rest of the program uses.

    Attributes:
      num_items: V; 0: not known yet.
      width: D, of the item table.
      similarity: of a query and an item, 'cosine' or 'dot' (inner product).
      temperature: cosine similarities are divided by it.
      dtype: of activations; parameters are float32.
      mesh: the devices that share the item table; None: one device.
      text_width: E, of frozen text vectors, for a model that trains `text_path.py` too; 0: none.
        The map is a parameter of the tree alone: methods of the module read tables that have it in
        them.
    """

    num_items: int = 0
    width: options.Width = 64
    similarity: Literal['cosine', 'dot'] = 'cosine'
    temperature: options.Temperature = 0.07
    dtype: Any = jnp.float32
    mesh: jax.sharding.Mesh | None = None
    text_width: int = 0

    # The model's name in tables of results.
    title: ClassVar[str] = ''
    # Rows of a training batch: 'next', histories packed end to end, the target is the next item;
    # 'masked', packed, an item is its own target; 'pairs', packed, with a second prefix that has
    # the same target; 'prefixes', one prefix a row, its target in the last column.
    row_layout: ClassVar[Literal['next', 'masked', 'pairs', 'prefixes']] = 'next'
    # Whether there is a query for each position, which depends on that position's prefix alone.
    causal: ClassVar[bool] = True
    # Whether the loss works on an item table whose rows are split over devices.
    shardable_items: ClassVar[bool] = False
    # Values of `LossOptions.loss` that the objective computes.
    losses: ClassVar[tuple[str, ...]] = ('ce', 'bce', 'sampled')
    # Whether the item vectors in training are `item_transform` of the table, row by row. Losses
    # then transform only the rows they need. A class whose `item_vectors` drops entries or adds a
    # column says False.
    row_wise_items: ClassVar[bool] = True
    # Training flags whose default differs for this model, by flag name.
    recipe: ClassVar[Mapping[str, Any]] = {}
    # Named sets of options, such as a literal reading of the paper.
    readings: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    # The class that is pre-trained first and turned into this model by `surgery_plan`.
    backbone: ClassVar[type['ItemModel'] | None] = None
    # Parameters at the top of the tree that no gradient moves.
    frozen_params: ClassVar[tuple[str, ...]] = ()
    # A method (params, batches, key) -> params that runs before each epoch.
    before_epoch: ClassVar[Any] = None

    def setup(self) -> None:
        shape_VD = (table_rows(self.num_items, self.mesh), self.width)
        self.item_table = self.param('item_table', layers.normal_init, shape_VD)

    def embed_items(self, tokens_BL: Array) -> Array:
        """Rows of the item table, [B, L, D] float32."""
        return self.item_table[tokens_BL]

    def item_transform(self, row_VD: Array) -> Array:
        """The item vectors of rows of the table, [V, D] -> [V, D], each row by itself."""
        return self.comparable(row_VD.astype(self.dtype))

    def item_vectors(self, *, train: bool = False) -> Array:
        """The item vectors, [V + 1, D] by item id; row 0 is the padding.

        A model with dropout on item vectors applies it if `train`.
        """
        return self.item_transform(self.item_table)

    def forward(
        self,
        tokens_BL: Array,
        positions_BL: Array,
        segments_BL: Array,
        *,
        train: bool = False,
        last: bool = False,
    ) -> tuple[Array, Array, Any]:
        """The queries, the item vectors and the intermediates, in one call.

        In one call the dropout of queries and of item vectors draws from one stream. Arguments and
        results are those of the model's `__call__` and `item_vectors`.
        """
        query, intermediates = self(tokens_BL, positions_BL, segments_BL, train=train, last=last)
        return query, self.item_vectors(train=train), intermediates

    @staticmethod
    def combine(score_BQV: Array) -> Array:
        """The score of each item, [B, V], from the scores of a history's queries; here one."""
        return score_BQV[:, 0]

    def comparable(self, x: Array, temperature: float = 1.0) -> Array:
        """Scales x to length 1 / temperature for the cosine; returns x for the inner product."""
        if self.similarity == 'dot':
            return x
        return unit(x, temperature)

    @nn.nowrap
    def item_loss(
        self, params: dict, batch: Batch, key: Array, loss: LossOptions
    ) -> tuple[Array, Array, Any]:
        """The loss of predicting items, without further terms: `next_item_loss`.

        Returns:
          The weighted sum, the sum of weights, and the model's intermediates.
        """
        return next_item_loss(self, params, batch, key, loss)

    @nn.nowrap
    def objective(
        self, params: dict, batch: Batch, key: Array, loss: LossOptions
    ) -> tuple[Array, Array, dict[str, Array]]:
        """The training objective of one batch.

        Args:
          params: the model's parameters.
          batch: of the class's `row_layout`.
          key: consumed, for dropout and everything else that is drawn.
          loss: the loss over items and its chunks.

        Returns:
          The weighted sum and the sum of weights, whose quotient is minimised, and the means of
          the objective's other terms by name, for logging; float32 scalars.
        """
        total, weight, _ = self.item_loss(params, batch, key, loss)
        return total, weight, {}

    @nn.nowrap
    def facet_projections(self, params: Mapping[str, Any]) -> Array | None:
        """The maps from an item's vector to its view by each head or branch, [H, D, K]; here None.

        Args:
          params: the model's parameters.
        """
        del params
        return None

    @nn.nowrap
    def validate(self) -> None:
        """Checks the options.

        Raises:
          ValueError: in one line, which option is wrong and what it may be.
        """
        options.check(self)

    @nn.nowrap
    def validate_loss(self, loss: LossOptions) -> None:
        """Checks that the model can be trained by this loss.

        Raises:
          ValueError: in one line.
        """
        if loss.loss not in self.losses:
            raise ValueError(
                f'loss={loss.loss} is not for {self.title}, which is trained by '
                f'{", ".join(self.losses)}'
            )


def unit(x: Array, temperature: float = 1.0) -> Array:
    """Scales x to length 1 / temperature over its last axis; zeros stay, without a gradient."""
    x32 = x.astype(jnp.float32)
    # The constant is under the root, so that the gradient of a row of zeros is zero and not NaN.
    inverse = jax.lax.rsqrt(jnp.sum(x32 * x32, axis=-1, keepdims=True) + 1e-12)
    return (x32 * (inverse / temperature)).astype(x.dtype)


def check_heads(width: int, num_heads: int) -> None:
    """Raises ValueError if the heads do not divide the width."""
    if width % num_heads:
        raise ValueError(
            f'width={width} does not divide into num_heads={num_heads} heads; make the width a '
            'multiple of the heads'
        )

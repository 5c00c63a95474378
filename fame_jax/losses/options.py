"""The loss that a run trains with, as one argument of a model's objective."""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossOptions:
    """Which loss over items an objective uses, and with which options.

    A JAX pytree whose only leaf is `popularity_V`, so that a jitted step takes the table as an
    argument; captured by the function it would be a constant of the program, too large at millions
    of items. The other fields are static: with other values the step is compiled again.

    Attributes:
      loss: 'ce' (cross-entropy over the whole catalogue), 'sampled' (sampled softmax) or 'bce'
        (binary cross-entropy).
      num_negatives: negatives, for 'bce' per position and for 'sampled' per step.
      negatives: for 'sampled', how they are drawn: 'uniform' or 'popularity'.
      chunk_tokens: for 'ce', tokens per chunk; 0: all at once; -1: chosen for the device.
      chunk_items: for 'ce', items per chunk; 0: all at once.
      future_targets: shares of the next item, the one after it, and so on, in the label of a
        position; (1,) is the next item alone.
      seen_weight: for 'ce', how often an item of the history counts among the negatives.
      popularity_V: int32 [V + 1] of `cumulative_counts`, for negatives by popularity; else None.
    """

    loss: str = dataclasses.field(default='ce', metadata={'static': True})
    num_negatives: int = dataclasses.field(default=1, metadata={'static': True})
    negatives: str = dataclasses.field(default='uniform', metadata={'static': True})
    chunk_tokens: int = dataclasses.field(default=-1, metadata={'static': True})
    chunk_items: int = dataclasses.field(default=0, metadata={'static': True})
    future_targets: tuple[float, ...] = dataclasses.field(default=(1.0,), metadata={'static': True})
    seen_weight: float = dataclasses.field(default=1.0, metadata={'static': True})
    popularity_V: jax.Array | None = None

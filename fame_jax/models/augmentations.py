"""Random views of packed histories for contrastive losses, and the ends of histories.

The operators of CL4SRec (Xie et al., ICDE 2022, arXiv 2010.14395, eqs. 4-6), which ICLRec uses too,
on whole rows in place: a history stays in its own columns, so no shape depends on the random draw.
An operator takes a key and the fields of packed rows, whose histories are contiguous and numbered
from 1, and returns the fields of a view, a function of the key.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Fields = tuple[Array, Array, Array]  # tokens_BL, positions_BL, segments_BL
Operator = Callable[[Array, Array, Array, Array], Fields]


def crop(
    key: Array, tokens_BL: Array, positions_BL: Array, segments_BL: Array, share: float
) -> Fields:
    """Keeps max(1, floor(share n)) consecutive items of each history of n; the rest is padding.

    Positions count from 0 at the first kept item; columns do not change.
    """
    first_BL, length_BL = history_spans(segments_BL)
    kept_BL = jnp.maximum(floor_share(length_BL, share), 1)
    skipped_BL = draw_below(key, first_BL, length_BL - kept_BL + 1)
    offset_BL = columns(segments_BL) - first_BL - skipped_BL
    inside_BL = (offset_BL >= 0) & (offset_BL < kept_BL) & (segments_BL > 0)
    fields = tokens_BL, positions_BL - skipped_BL, segments_BL
    return tuple(jnp.where(inside_BL, field, 0) for field in fields)


def mask(
    key: Array,
    tokens_BL: Array,
    positions_BL: Array,
    segments_BL: Array,
    share: float,
    mask_id: int,
) -> Fields:
    """Replaces floor(share n) random items of each history by mask_id; at least one item stays.

    With mask_id 0 they become padding, which no position attends to; the positions of the others do
    not change and have gaps, as in ICLRec's code. CL4SRec has a [MASK].
    """
    first_BL, length_BL = history_spans(segments_BL)
    number_BL = jnp.minimum(floor_share(length_BL, share), length_BL - 1)
    picked_BL = columns(segments_BL) - first_BL < number_BL
    masked_BL = shuffle(key, first_BL, picked_BL) & (segments_BL > 0)
    tokens_BL = jnp.where(masked_BL, mask_id, tokens_BL)
    if mask_id:
        return tokens_BL, positions_BL, segments_BL
    return tokens_BL, *(jnp.where(masked_BL, 0, field) for field in (positions_BL, segments_BL))


def reorder(
    key: Array, tokens_BL: Array, positions_BL: Array, segments_BL: Array, share: float
) -> Fields:
    """Shuffles floor(share n) consecutive items of each history."""
    begin_key, shuffle_key = jax.random.split(key)
    first_BL, length_BL = history_spans(segments_BL)
    moved_BL = floor_share(length_BL, share)
    begin_BL = first_BL + draw_below(begin_key, first_BL, length_BL - moved_BL + 1)
    column_BL = columns(segments_BL)
    inside_BL = (column_BL >= begin_BL) & (column_BL < begin_BL + moved_BL)
    group_BL = jnp.where(inside_BL, begin_BL, column_BL)
    return shuffle(shuffle_key, group_BL, tokens_BL), positions_BL, segments_BL


def two_views(
    key: Array, fields: Fields, operators: Sequence[Operator], *, different: bool = True
) -> tuple[Fields, Fields]:
    """Two views of every history, each by an operator drawn at random for that history.

    Args:
      key: consumed.
      fields: tokens_BL, positions_BL and segments_BL.
      operators: functions of a key and the three fields.
      different: whether the two operators of a history always differ (CL4SRec, section 3.2); if
        not, they are drawn independently, as in ICLRec's code.

    Returns:
      The fields of one view and of the other.
    """
    one_key, other_key, choice_key, step_key = jax.random.split(key, 4)

    def all_drawn(key: Array) -> list[Fields]:
        keys = jax.random.split(key, len(operators))
        return [operator(key, *fields) for operator, key in zip(operators, keys)]

    first_BL, _ = history_spans(fields[2])
    number_BL = jnp.full_like(first_BL, len(operators))
    one_BL = draw_below(choice_key, first_BL, number_BL)
    drawn = all_drawn(one_key)
    if different:
        # The two views use different operators of `drawn`, which were drawn with different keys.
        other_BL = (one_BL + 1 + draw_below(step_key, first_BL, number_BL - 1)) % number_BL
        return select(one_BL, drawn), select(other_BL, drawn)
    other_BL = draw_below(step_key, first_BL, number_BL)
    return select(one_BL, drawn), select(other_BL, all_drawn(other_key))


def ends(segments_BL: Array, size: int) -> tuple[Array, Array]:
    """The last position of each history, as an index into the B * L positions of the rows.

    A view keeps every history, so the ends of two views are in the same order.

    Args:
      segments_BL: int32, which history of the row, ascending; 0 for padding, also inside a history.
      size: A, the most ends that are returned, the first ones; at most B * L.

    Returns:
      index_A, int32, and real_A, bool; index 0 where there are fewer histories than A.
    """
    none = np.iinfo(np.int32).max
    # Numbers ascend, so the minimum to the right is the number of the next item's history.
    ahead_BL = jnp.where(segments_BL > 0, segments_BL, none)[:, 1:]
    next_BL = jax.lax.cummin(jnp.pad(ahead_BL, ((0, 0), (0, 1)), constant_values=none), 1, True)
    end_T = ((segments_BL > 0) & (segments_BL != next_BL)).reshape(-1)
    (index_A,) = jnp.nonzero(end_T, size=min(size, end_T.size), fill_value=-1)
    return jnp.maximum(index_A, 0), index_A >= 0


def encode(module: nn.Module, params: dict, key: Array, *rows: Fields) -> list[Array]:
    """The model's `encode` of several sets of rows of one shape, in one call.

    Each set has its own dropout.

    Args:
      module: a model with `encode`.
      params: its parameters.
      key: consumed, for dropout.
      *rows: for each set tokens_BL, positions_BL and segments_BL.

    Returns:
      For each set the encodings of its B * L positions, [T, D].
    """
    together = [jnp.concatenate(fields) for fields in zip(*rows)]
    h_BLD, _ = module.apply(
        {'params': params}, *together, train=True, rngs={'dropout': key}, method='encode'
    )
    return jnp.split(h_BLD.reshape(-1, h_BLD.shape[-1]), len(rows))


def history_spans(segments_BL: Array) -> tuple[Array, Array]:
    """The first column and the length of each position's history; or of its run of padding."""
    column_BL = columns(segments_BL)
    begins_BL = segments_BL != jnp.pad(segments_BL[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    ends_BL = segments_BL != jnp.pad(segments_BL[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    first_BL = jax.lax.cummax(jnp.where(begins_BL, column_BL, 0), 1)
    widest = segments_BL.shape[1]
    last_BL = jax.lax.cummin(jnp.where(ends_BL, column_BL, widest), 1, True)
    return first_BL, last_BL - first_BL + 1


def columns(segments_BL: Array) -> Array:
    """The column of each position; int32."""
    return jax.lax.broadcasted_iota(jnp.int32, segments_BL.shape, 1)


def floor_share(length_BL: Array, share: float) -> Array:
    """floor(share n) in Python's float64, as in the authors' codes; int32."""
    table_L = np.floor(share * np.arange(length_BL.shape[1] + 1)).astype(np.int32)
    return jnp.asarray(table_L)[length_BL]


def draw_below(key: Array, first_BL: Array, below_BL: Array) -> Array:
    """A random integer in 0 .. below_BL - 1, the same at all positions of a history; int32."""
    uniform_BL = jax.random.uniform(key, first_BL.shape)
    drawn_BL = jnp.take_along_axis(uniform_BL, first_BL, axis=1)
    return (drawn_BL * below_BL).astype(jnp.int32)


def shuffle(key: Array, group_BL: Array, value_BL: Array) -> Array:
    """Values in random order within their group; groups are contiguous and ascend along a row."""
    uniform_BL = jax.random.uniform(key, group_BL.shape)
    return jax.lax.sort((group_BL, uniform_BL, value_BL), dimension=1, num_keys=2)[2]


def select(choice_BL: Array, drawn: Sequence[Fields]) -> Fields:
    """The fields of the operator that was chosen for each position's history."""
    which = [choice_BL == i for i in range(len(drawn))]
    return tuple(jnp.select(which, candidates) for candidates in zip(*drawn))

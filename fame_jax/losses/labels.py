"""Soft labels from the next items of a history, and seen items that weigh more as negatives.

Both work on packed rows, fields [B, L] of a `Batch`, and give arguments of the losses: targets and
their shares, and the logarithm of a further term of the softmax's sum.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from fame_jax.losses.ops import LOWEST


def future_targets(
    target_BL: jax.Array, segment_BL: jax.Array, shares: Sequence[float]
) -> tuple[jax.Array, jax.Array]:
    """The next items of each position as a soft label.

    The label of a position mixes the next F items of its history by the shares c,

        a_f = c_f [there is an f-th next item] / sum_g c_g [there is a g-th next item].

    Only targets of the same segment count. The items that are kept for validation and test are no
    targets of a training row, so they are in no label.

    Args:
      target_BL: int32, the next item of each position, 0 where there is nothing to predict.
      segment_BL: int32, the number of the history in its row, 0 for padding.
      shares: c, of the next item, the one after it, and so on; the first is positive.

    Returns:
      target_BLF: int32, 0 where there is no such item.
      share_BLF: float32, sums to 1, or to 0 where a position has no target.
    """
    length = target_BL.shape[1]
    targets, parts = [], []
    for f, share in enumerate(shares):
        # The f-th next item is the target of the position f columns later.
        later = ((0, 0), (0, min(f, length)))
        moved_BL = jnp.pad(target_BL[:, f:], later)
        same_BL = jnp.pad(segment_BL[:, f:], later) == segment_BL
        moved_BL = jnp.where(same_BL & (target_BL > 0), moved_BL, 0)
        targets.append(moved_BL)
        parts.append(jnp.where(moved_BL > 0, share, 0.0))
    share_BLF = jnp.stack(parts, axis=-1)
    total_BL1 = share_BLF.sum(axis=-1, keepdims=True)
    return jnp.stack(targets, axis=-1), share_BLF / jnp.where(total_BL1 > 0, total_BL1, 1)


def log_seen(
    query_BLD: jax.Array,
    row_BLD: jax.Array,
    token_BL: jax.Array,
    segment_BL: jax.Array,
    target_BL: jax.Array,
    seen_weight: float,
    item_transform: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """The further term by which the items of a position's history weigh more as negatives.

    With the weight w, the sum of exponentials of a position becomes

        sum_v exp(s_v) + (w - 1) sum_{v seen, not the target} exp(s_v)

    where the seen items are those of its history up to the position, each once. The scores of the
    seen items are one product of a row's queries and a row's items, [B, L, L].

    Args:
      query_BLD: queries.
      row_BLD: table rows of the tokens.
      token_BL: int32 items; 0 for padding.
      segment_BL: int32, the number of the history in its row, 0 for padding.
      target_BL: int32, the next item of each position.
      seen_weight: w, larger than 1.
      item_transform: table rows -> item vectors, [n, D] -> [n, D].

    Returns:
      float32 [B, L], the logarithm of the second sum times w - 1; about -1e30 where it is 0.
    """
    length, width = token_BL.shape[1], row_BLD.shape[-1]
    vector_BLD = item_transform(row_BLD.reshape(-1, width)).reshape(*row_BLD.shape[:-1], -1)
    score_BQS = jnp.einsum(
        'BQD,BSD->BQS', query_BLD, vector_BLD, preferred_element_type=jnp.float32
    )
    same_BQS = segment_BL[:, :, None] == segment_BL[:, None, :]
    up_to_1QS = jnp.tri(length, dtype=bool)[None]
    equal_BQS = (token_BL[:, :, None] == token_BL[:, None, :]) & same_BQS
    # An item counts where it stands for the first time in its history.
    first_BL = ~(equal_BQS & jnp.tri(length, k=-1, dtype=bool)[None]).any(axis=2)
    counts_B1S = (first_BL & (token_BL > 0))[:, None, :]
    other_BQS = token_BL[:, None, :] != target_BL[:, :, None]
    valid_BQS = same_BQS & up_to_1QS & counts_B1S & other_BQS
    # A finite start keeps the gradient of a position without seen items finite, and 0.
    score_BQS = jnp.where(valid_BQS, score_BQS, LOWEST)
    return jax.nn.logsumexp(score_BQS, axis=-1) + jnp.log(seen_weight - 1)

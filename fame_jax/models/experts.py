"""Experts that share the keys and values of their head: who attends, who counts, and how evenly.

A is the number of a head's N experts that are active at a position; `pick_BLHAN` names them by rows
of the unit matrix. A router's shares of the experts sum to 1 at each position and head, and those
that are not active have 0.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array

DEAD = 0.1  # of an equal share: an expert that is active for less is not used


def choose(share_BLHN: Array, active: int) -> tuple[Array, Array]:
    """The experts of largest share, of equal ones the first, and their shares beside each other.

    Args:
      share_BLHN: of all experts.
      active: A, 1 to N.

    Returns:
      router_BLHN: the shares of the A experts, made to sum to 1, and 0 elsewhere.
      pick_BLHAN: 0 or 1, without a gradient; the largest share first.
    """
    _, expert_BLHA = jax.lax.top_k(share_BLHN, active)
    pick_BLHAN = jax.nn.one_hot(expert_BLHA, share_BLHN.shape[-1], dtype=share_BLHN.dtype)
    kept_BLHN = share_BLHN * pick_BLHAN.sum(axis=-2)
    # The largest of N shares is 1 / N at least, so there is no division by nothing.
    return kept_BLHN / kept_BLHN.sum(axis=-1, keepdims=True), pick_BLHAN


def gather(query_BLHNK: Array, pick_BLHAN: Array) -> Array:
    """What is picked of each position's queries, [B, L, H, A, K]."""
    # A product and not an indexing, whose gradient would be a scatter.
    return jnp.einsum('BLHAN,BLHNK->BLHAK', pick_BLHAN, query_BLHNK)


def spread(weight_BHAQS: Array, pick_BQHAN: Array) -> Array:
    """Weights of the active experts as all experts', [B, H, N, Q, S]: 0 of who did not attend."""
    return jnp.einsum('BHAQS,BQHAN->BHNQS', weight_BHAQS, pick_BQHAN.astype(weight_BHAQS.dtype))


def attend_fused(
    query_BQHNK: Array,
    key_BSHK: Array,
    value_BSHK: Array,
    mask_BQS: Array,
    bias_HQS: Array | None,
    scale: float,
) -> Array:
    """`layers.attend` without its weights and their dropout, by jax.nn.dot_product_attention.

    Experts that share keys and values are grouped queries (Ainslie et al., arXiv 2305.13245): N * H
    query heads over H key heads. The implementation is JAX's own choice, XLA's in 2026.
    """
    shape_BQHNK = query_BQHNK.shape
    batch, length, num_heads, num_experts, width = shape_BQHNK
    mixed_BQCK = jax.nn.dot_product_attention(
        query_BQHNK.reshape(batch, length, num_heads * num_experts, width),
        key_BSHK,
        value_BSHK,
        bias=None if bias_HQS is None else jnp.repeat(bias_HQS, num_experts, axis=0)[None],
        mask=mask_BQS[:, None],
        scale=scale,
    )
    return mixed_BQCK.reshape(shape_BQHNK)


def in_turns(
    attend: Callable[[Array, Array | None], Array],
    query_BQHNK: Array,
    octets_BHNQS: Array | None,
) -> Array:
    """Has the experts attend one after another, and once more in the backward pass.

    So one expert's weights are held at a time, [B, H, 1, Q, S], where all of them would be kept for
    the backward pass. What is dropped is drawn before, and is the same both times.

    Args:
      attend: (query_BQHNK, octets_BHNQS) -> mixed_BQHNK, for any number of experts.
      query_BQHNK: of all experts that attend.
      octets_BHNQS: what `layers.thin` takes; None: nothing is dropped.

    Returns:
      mixed_BQHNK.
    """

    def turn(own: tuple[Array, Array | None]) -> Array:
        query_BQHK, octets_BHQS = own
        octets_BHNQS = None if octets_BHQS is None else octets_BHQS[:, :, None]
        return attend(query_BQHK[:, :, :, None], octets_BHNQS)[:, :, :, 0]

    octets = None if octets_BHNQS is None else jnp.moveaxis(octets_BHNQS, 2, 0)
    turns = jnp.moveaxis(query_BQHNK, 3, 0), octets
    # Inside of a loop XLA cannot merge the two passes, so nothing has to keep it from that.
    mixed_NBQHK = jax.lax.map(jax.checkpoint(turn, prevent_cse=False), turns)
    return jnp.moveaxis(mixed_NBQHK, 0, 3)


def balance(share_BLHN: Array, router_BLHN: Array, real_BL: Array) -> Array:
    """How unevenly the experts are used, as a loss: 1 when all alike, N when one alone is.

    N sum_n f_n P_n, where f_n is the part of all choices that fell on expert n, and P_n its mean
    share before the choice, through which the gradient goes (Fedus et al., arXiv 2101.03961, eqs. 4
    to 6; Lepikhin et al., arXiv 2006.16668). The mean over heads.

    Args:
      share_BLHN: of all experts.
      router_BLHN: as `choose` has it.
      real_BL: bool; padding does not count.
    """
    real_BL11 = real_BL[:, :, None, None]
    active_HN = jnp.sum((router_BLHN > 0) & real_BL11, axis=(0, 1), dtype=jnp.float32)
    part_HN = active_HN / jnp.maximum(active_HN.sum(axis=-1, keepdims=True), 1)
    share_HN = jnp.sum(share_BLHN.astype(jnp.float32) * real_BL11, axis=(0, 1))
    mean_HN = share_HN / jnp.maximum(jnp.sum(real_BL, dtype=jnp.float32), 1)
    return share_BLHN.shape[-1] * jnp.mean(jnp.sum(part_HN * mean_HN, axis=-1))


def use(router_BLHN: Array, real_BL: Array) -> dict[str, Any]:
    """How much each expert is used, as plain values for JSON.

    Args:
      router_BLHN: as the block used it.
      real_BL: bool, the positions that count; at least one.

    Returns:
      A dict:
        share    [H][N], the mean share of each expert
        active   [H][N], the part of the positions at which it is active
        entropy  [H], of the mean shares, in units of its maximum; None of one expert
        dead     how many experts of all heads have a mean share below 1 / (10 N)
    """
    num_experts = router_BLHN.shape[-1]
    router_THN = router_BLHN[real_BL].astype(jnp.float32)
    share_HN = router_THN.mean(axis=0)
    log_HN = jnp.log(jnp.where(share_HN > 0, share_HN, 1))
    entropy_H = -jnp.sum(share_HN * log_HN, axis=-1) / jnp.log(max(num_experts, 2))
    return {
        'share': share_HN.tolist(),
        'active': (router_THN > 0).mean(axis=0).tolist(),
        'entropy': entropy_H.tolist() if num_experts > 1 else None,
        'dead': int(jnp.sum(share_HN < DEAD / num_experts)),
    }

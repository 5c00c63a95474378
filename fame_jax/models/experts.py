"""Experts that share the keys and values of their head: top-k selection, attention, balance.

A is the number of active experts of a head's N at a position; one-hot rows `pick_BLHAN` select
them. The router's weights of a head's experts sum to 1 at each position; those of inactive experts
are 0.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array


def top_k_experts(share_BLHN: Array, active: int) -> tuple[Array, Array]:
    """The experts with the largest shares and their renormalised shares; ties take the first.

    Args:
      share_BLHN: the router's softmax over all experts.
      active: A, 1 to N.

    Returns:
      router_BLHN: the shares of the A experts, scaled to sum to 1, and 0 elsewhere.
      pick_BLHAN: one-hot rows, the largest share first; without a gradient.
    """
    _, expert_BLHA = jax.lax.top_k(share_BLHN, active)
    pick_BLHAN = jax.nn.one_hot(expert_BLHA, share_BLHN.shape[-1], dtype=share_BLHN.dtype)
    kept_BLHN = share_BLHN * pick_BLHAN.sum(axis=-2)
    # The largest of N shares is at least 1 / N, so the sum is never zero.
    return kept_BLHN / kept_BLHN.sum(axis=-1, keepdims=True), pick_BLHAN


def gather_queries(query_BLHNK: Array, pick_BLHAN: Array) -> Array:
    """The queries of the active experts, [B, L, H, A, K]."""
    # A product with one-hot rows: the gradient of indexing would be a scatter.
    return jnp.einsum('BLHAN,BLHNK->BLHAK', pick_BLHAN, query_BLHNK)


def scatter_weights(weight_BHAQS: Array, pick_BQHAN: Array) -> Array:
    """Attention weights of the active experts as those of all, [B, H, N, Q, S]; 0 for the rest."""
    return jnp.einsum('BHAQS,BQHAN->BHNQS', weight_BHAQS, pick_BQHAN.astype(weight_BHAQS.dtype))


def attend_in_turns(
    attend: Callable[[Array, Array | None], Array],
    query_BQHNK: Array,
    dropout_bits_BHNQS: Array | None,
) -> Array:
    """Attention of one expert after another, recomputed in the backward pass.

    Memory holds the attention weights of one expert, [B, H, 1, Q, S], and not of all of them.
    Dropout bits are drawn beforehand, so both passes drop the same entries.

    Args:
      attend: (query_BQHNK, dropout_bits_BHNQS) -> mixed_BQHNK, for any number of experts.
      query_BQHNK: the queries of all experts that attend.
      dropout_bits_BHNQS: for `layers.apply_dropout`; None: nothing is dropped.

    Returns:
      mixed_BQHNK.
    """

    def turn(expert: tuple[Array, Array | None]) -> Array:
        query_BQHK, bits_BHQS = expert
        bits_BHNQS = None if bits_BHQS is None else bits_BHQS[:, :, None]
        return attend(query_BQHK[:, :, :, None], bits_BHNQS)[:, :, :, 0]

    bits_NBHQS = None if dropout_bits_BHNQS is None else jnp.moveaxis(dropout_bits_BHNQS, 2, 0)
    turns = jnp.moveaxis(query_BQHNK, 3, 0), bits_NBHQS
    # XLA cannot merge the two passes inside a loop, so `prevent_cse` is not needed.
    mixed_NBQHK = jax.lax.map(jax.checkpoint(turn, prevent_cse=False), turns)
    return jnp.moveaxis(mixed_NBQHK, 0, 3)


def balance_loss(
    share_BLHN: Array, router_BLHN: Array, real_BL: Array, *, all_active: bool = False
) -> Array:
    """The load-balancing loss: 1 if all experts are used alike, N if one expert alone is used.

    N sum_n f_n P_n, where f_n is the fraction of selections that picked expert n, and P_n its mean
    share before the selection, which carries the gradient (Fedus et al., arXiv 2101.03961, eqs. 4
    to 6; Lepikhin et al., arXiv 2006.16668). The mean over heads. Where all experts are active
    every fraction is 1 / N and the loss would be 1 whatever the router does, so f_n is P_n then.

    Args:
      share_BLHN: the router's softmax over all experts.
      router_BLHN: its weights after the selection, see `top_k_experts`.
      real_BL: bool, False for padding.
      all_active: whether all experts are active.

    Returns:
      A float32 scalar.
    """
    real_BL11 = real_BL[:, :, None, None]
    share_HN = jnp.sum(share_BLHN.astype(jnp.float32) * real_BL11, axis=(0, 1))
    mean_HN = share_HN / jnp.maximum(jnp.sum(real_BL, dtype=jnp.float32), 1)
    if all_active:
        fraction_HN = mean_HN
    else:
        active_HN = jnp.sum((router_BLHN > 0) & real_BL11, axis=(0, 1), dtype=jnp.float32)
        fraction_HN = active_HN / jnp.maximum(active_HN.sum(axis=-1, keepdims=True), 1)
    return share_BLHN.shape[-1] * jnp.mean(jnp.sum(fraction_HN * mean_HN, axis=-1))

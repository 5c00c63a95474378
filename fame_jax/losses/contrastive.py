"""Contrast of vectors with one another: supervised by labels, and of two views of the same rows."""

import jax
import jax.numpy as jnp

from fame_jax.losses.pieces import matmul, weigh


def supervised_contrastive(
    vector_BK: jax.Array, weight_BB: jax.Array, compared_BB: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """Weighted supervised contrast: each anchor against its positives among all it is compared to.

        sum_i sum_p w_ip (log sum_a exp s_ia - s_ip) / sum_p w_ip,    s_ij = z_i . z_j / temperature

    with a over all that i is compared to. L_out of Khosla et al. 2020 (arXiv 2004.11362, eq. 2), a
    weight for each positive, since labels may overlap in part. An anchor without positives
    contributes nothing and is not counted. With one positive an anchor it is InfoNCE.

    Args:
      vector_BK: [B, K] float32; of unit length there, taken as they are here.
      weight_BB: [B, B] float32 >= 0, 0 for a pair that is no positive.
      compared_BB: [B, B] bool; a pair that is not compared is neither positive nor negative. An
          anchor is never compared to itself.
      temperature: > 0.

    Returns:
      The sum over anchors and the number of anchors with a positive, both float32 scalars.
    """
    compared_BB = compared_BB & ~jnp.eye(len(vector_BK), dtype=bool)
    weight_BB = jnp.where(compared_BB, weight_BB, 0)
    logit_BB = matmul(vector_BK, vector_BK.T) / temperature
    # A row that is compared to nothing would take the logarithm of zero, and its gradient.
    alone_B1 = ~compared_BB.any(axis=1, keepdims=True)
    heard_BB = jnp.where(compared_BB | alone_B1, logit_BB, -jnp.inf)
    lost_BB = jax.nn.logsumexp(heard_BB, axis=1, keepdims=True) - logit_BB
    total_B = weight_BB.sum(axis=1)
    loss_B = (weight_BB * lost_BB).sum(axis=1) / jnp.where(total_B > 0, total_B, 1)
    return weigh(loss_B, (total_B > 0).astype(jnp.float32))


def two_view_contrast(
    one_BK: jax.Array, other_BK: jax.Array, real_B: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """Contrast of two views of the same rows: each view against its other, among all views.

        sum over both views of (log sum_a exp s_ia - s_ip),    s_ij = z_i . z_j / temperature

    with p the other view and a over the 2 B - 1 views that are not i. NT-Xent (Chen et al. 2020,
    arXiv 2002.05709, eq. 1) of vectors as they are, not of unit length, as in CL4SRec (arXiv
    2010.14395, eq. 3), DuoRec and ICLRec.

    Args:
      one_BK: [B, K].
      other_BK: [B, K].
      real_B: [B] bool; rows that are not real are neither anchors nor compared to.
      temperature: > 0.

    Returns:
      The sum over the real views and their number, both float32 scalars.
    """
    vector_BK = jnp.concatenate([one_BK, other_BK])
    real_B = jnp.concatenate([real_B, real_B])
    other_BB = jnp.roll(jnp.eye(len(vector_BK)), len(one_BK), axis=1)
    compared_BB = real_B[:, None] & real_B[None, :]
    return supervised_contrastive(vector_BK, other_BB, compared_BB, temperature)


def label_overlap(label_BS: jax.Array) -> jax.Array:
    """Shared labels over labels of either (Jaccard), of every pair; 1 or 0 for single labels.

    Args:
      label_BS: [B, S] int32, distinct in a row, -1 for none.

    Returns:
      [B, B] float32; 0 where a row has no label.
    """
    num_B = (label_BS >= 0).sum(axis=1)
    same_BBSS = label_BS[:, None, :, None] == label_BS[None, :, None, :]
    shared_BB = (same_BBSS & (label_BS >= 0)[:, None, :, None]).sum(axis=(2, 3))
    either_BB = num_B[:, None] + num_B[None, :] - shared_BB
    return shared_BB / jnp.maximum(either_BB, 1).astype(jnp.float32)

"""Contrastive losses: supervised by labels, and between two views of the same rows."""

import jax
import jax.numpy as jnp

from fame_jax.losses.ops import matmul, weighted_sum


def supervised_contrastive(
    vector_BK: jax.Array, weight_BB: jax.Array, compared_BB: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """Weighted supervised contrastive loss.

        sum_i sum_p w_ip (log sum_a exp s_ia - s_ip) / sum_p w_ip,    s_ij = z_i . z_j / temperature

    with a over all vectors that anchor i is compared to. L_out of Khosla et al. 2020 (arXiv
    2004.11362, eq. 2), extended by a weight per positive, since labels may overlap partly. An
    anchor without positives adds nothing and is not counted. With one positive per anchor it is
    InfoNCE.

    Args:
      vector_BK: [B, K] float32; not normalised here (the paper uses unit vectors).
      weight_BB: [B, B] float32 >= 0, the weights of positive pairs, 0 for other pairs.
      compared_BB: [B, B] bool mask of the pairs that count, as positives or negatives; the diagonal
        is ignored.
      temperature: > 0.

    Returns:
      The sum over anchors and the number of anchors with a positive, both float32 scalars.
    """
    compared_BB = compared_BB & ~jnp.eye(len(vector_BK), dtype=bool)
    weight_BB = jnp.where(compared_BB, weight_BB, 0)
    logit_BB = matmul(vector_BK, vector_BK.T) / temperature
    # Rows without any pair keep their logits: log 0 and its gradient are not finite.
    empty_B1 = ~compared_BB.any(axis=1, keepdims=True)
    masked_BB = jnp.where(compared_BB | empty_B1, logit_BB, -jnp.inf)
    loss_BB = jax.nn.logsumexp(masked_BB, axis=1, keepdims=True) - logit_BB
    total_B = weight_BB.sum(axis=1)
    loss_B = (weight_BB * loss_BB).sum(axis=1) / jnp.where(total_B > 0, total_B, 1)
    return weighted_sum(loss_B, (total_B > 0).astype(jnp.float32))


def two_view_contrast(
    one_BK: jax.Array, other_BK: jax.Array, is_real_B: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """Contrastive loss between two views of the same rows.

        sum over both views of (log sum_a exp s_ia - s_ip),    s_ij = z_i . z_j / temperature

    with p the other view of the row of i and a over the 2 B - 1 other views. NT-Xent (Chen et al.
    2020, arXiv 2002.05709, eq. 1) without normalising the vectors, as in CL4SRec (arXiv 2010.14395,
    eq. 3), DuoRec and ICLRec.

    Args:
      one_BK: [B, K], the first views.
      other_BK: [B, K], the second views of the same rows.
      is_real_B: [B] bool; False for padding rows, which are neither anchors nor negatives.
      temperature: > 0.

    Returns:
      The sum over the views of real rows and their number, both float32 scalars.
    """
    vector_BK = jnp.concatenate([one_BK, other_BK])
    is_real_B = jnp.concatenate([is_real_B, is_real_B])
    other_BB = jnp.roll(jnp.eye(len(vector_BK)), len(one_BK), axis=1)
    compared_BB = is_real_B[:, None] & is_real_B[None, :]
    return supervised_contrastive(vector_BK, other_BB, compared_BB, temperature)


def label_overlap(label_BS: jax.Array) -> jax.Array:
    """Jaccard overlap of the label sets of every pair of rows; 1 or 0 where each has one label.

    Args:
      label_BS: [B, S] int32, the distinct labels of each row, padded with -1.

    Returns:
      [B, B] float32; 0 where a row has no label.
    """
    num_B = (label_BS >= 0).sum(axis=1)
    same_BBSS = label_BS[:, None, :, None] == label_BS[None, :, None, :]
    shared_BB = (same_BBSS & (label_BS >= 0)[:, None, :, None]).sum(axis=(2, 3))
    either_BB = num_B[:, None] + num_B[None, :] - shared_BB
    return shared_BB / jnp.maximum(either_BB, 1).astype(jnp.float32)

"""ICLRec (Chen et al., WWW 2022, arXiv 2202.02519): SASRec, and histories drawn to their intents.

    E-step, before each epoch: k-means of mean f(s) over all training histories gives the intents
    M-step: L = L_rec + lambda L_inst + beta L_intent
    L_inst   = NTXent(f(v1), f(v2))        two views of a history, all positions concatenated
    L_intent = 1/2 [NTXent(mean f(v1), c) + NTXent(mean f(v2), c)],   c the intent nearest mean f(s)

with f SASRec's last block. As in the authors' code, not the paper: histories of one intent are each
other's negatives in L_intent and L_inst (its option to leave them out is off in its scripts), so
that a shared intent stands in the denominator once for each history that has it.

The authors' code differs: its L_rec is binary cross-entropy with one negative; means are over 50
positions, padding included, here over a history's items; k-means is the best of five random starts,
here one of k-means++; the nearest intent is asked of the centroids before they are brought to unit
length, here after; f runs anew on the views for each contrast, with another dropout, here once for
both. A view whose last item is hidden has an empty last column there; here a view ends with the
last item that is left.
"""

import functools
import warnings
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fame_jax import losses
from fame_jax.batch import Batch
from fame_jax.models import kmeans, layers, objective, views
from fame_jax.models.items import unit
from fame_jax.models.sasrec import SASRec

Array = jax.Array


class ICLRec(SASRec):
    """SASRec, and the intents of its histories: a parameter that `refresh` moves, no gradient."""

    intents: int

    def setup(self) -> None:
        super().setup()
        shape_CD = (self.intents, self.width)
        self.intent_table = self.param('intents', layers.normal_init, shape_CD)

    def nearest_intents(self, mean_AD: Array) -> Array:
        """The intent nearest to the mean of each history's encodings; float32 [A, D]."""
        intent_CD = jax.lax.stop_gradient(self.intent_table)
        return intent_CD[kmeans.nearest(jax.lax.stop_gradient(mean_AD), intent_CD)]


def refresh(module: ICLRec, params: dict, batches: Iterable[Batch], key: Array) -> dict:
    """The parameters with the intents of this epoch: the E-step.

    Args:
      module: an ICLRec.
      params: its parameters.
      batches: an epoch's, packed rows.
      key: consumed, for the seeds of k-means.

    Returns:
      The same parameters but for 'intents', the centroids in unit length. Where there are fewer
      histories than intents, each history is one, several times if need be, and a warning says so.
    """
    parts = (jax.device_get(_ended_means(module, params, batch)) for batch in batches)
    mean_ND = np.concatenate([mean_AD[real_A] for mean_AD, real_A in parts])
    clusters = min(module.intents, len(mean_ND))
    if clusters < module.intents:
        warnings.warn(
            f'--intents={module.intents} is more than the {clusters} training histories; some are '
            'copies',
            stacklevel=2,
        )
    found = kmeans.fit(key, mean_ND, np.ones(len(mean_ND)), clusters=clusters)
    copied_CD = unit(found.centroid_CD)[np.arange(module.intents) % clusters]
    return params | {'intents': copied_CD}


@functools.partial(jax.jit, static_argnums=0)
def _ended_means(module: ICLRec, params: dict, batch: Batch) -> tuple[Array, Array]:
    """The mean encoding of each history of a batch, [A, D], and which are one."""
    h_BLD, _ = module.apply({'params': params}, *batch[:3], method='encode')
    index_A, real_A = views.ends(batch.segments_BL, batch.segments_BL.size)
    return means(h_BLD.reshape(-1, h_BLD.shape[-1]), batch.segments_BL, index_A), real_A


def means(h_TD: Array, segments_BL: Array, index_A: Array) -> Array:
    """The mean over the history that holds a position, given its index in T; float32 [A, D]."""
    same_BQS = (segments_BL[:, :, None] == segments_BL[:, None, :]).astype(jnp.float32)
    h_BSD = h_TD.reshape(*segments_BL.shape, -1).astype(jnp.float32)
    mean_BQD = jnp.einsum('BQS,BSD->BQD', same_BQS, h_BSD) / same_BQS.sum(axis=2, keepdims=True)
    return mean_BQD.reshape(h_TD.shape)[index_A]


def lay_out(h_TD: Array, segments_BL: Array, index_A: Array, length: int) -> Array:
    """All positions of the histories that end at an index in T, as one vector each.

    Returns:
      float32 [A, C D] with C = `length`; a history's last position is last, zeros where it has
      none.
    """
    segment_T = jnp.asarray(segments_BL).reshape(-1)
    back_C = jnp.arange(length)[::-1]
    index_AC = index_A[:, None] - back_C[None, :]
    in_row_AC = (index_A % segments_BL.shape[1])[:, None] >= back_C[None, :]
    own_AC = in_row_AC & (segment_T[index_AC] == segment_T[index_A][:, None])
    h_ACD = jnp.where(own_AC[..., None], h_TD[index_AC].astype(jnp.float32), 0)
    return h_ACD.reshape(len(index_A), -1)


def intent_contrast(
    module: ICLRec,
    params: dict,
    batch: Batch,
    key: Array,
    *,
    crop_share: float,
    mask_share: float,
    reorder_share: float,
    contrast_weight: float,
    contrast_temperature: float,
    contrast_anchors: int,
    intent_weight: float,
    **item_options: Any,
) -> tuple[Array, Array]:
    """The next item's loss, and the contrasts of views and of intents.

    Args:
      module: an ICLRec.
      params: its parameters.
      batch: fields [B, L], packed rows.
      key: consumed, for the views, dropout and negatives.
      crop_share: of a history that is kept by the view that crops; the authors' is 0.2.
      mask_share: that the view that masks hides, as if it were padding; 0.7.
      reorder_share: that the view that reorders shuffles; 0.2.
      contrast_weight: lambda.
      contrast_temperature: of both contrasts, of inner products.
      contrast_anchors: A, histories that are contrasted at the most, the batch's first.
      intent_weight: beta.
      **item_options: those of `objective.item_loss`.

    Returns:
      The weighted sum over positions, the contrasts' means times the count in it, and the sum of
      weights, float32 scalars.
    """
    view_key, dropout_key, negative_key = jax.random.split(key, 3)
    operators = (
        functools.partial(views.crop, share=crop_share),
        functools.partial(views.mask, share=mask_share, mask_id=0),
        functools.partial(views.reorder, share=reorder_share),
    )
    two = views.two_views(view_key, batch[:3], operators, different=False)
    rows = batch[:3], *two
    encoded = views.encode(module, params, dropout_key, *rows)
    query_TD = module.comparable(encoded[0], module.temperature)
    query_BLD = query_TD.reshape(*batch.tokens_BL.shape, -1)
    item_VD = module.apply({'params': params}, train=True, method='item_vectors')
    where = {'num_items': module.num_items, 'mesh': module.mesh}
    loss = objective.item_loss(query_BLD, item_VD, batch, negative_key, **where, **item_options)
    # A view keeps every history, so all three find the same ones, in the same order.
    ended = [views.ends(fields[2], contrast_anchors) for fields in rows]
    (_, real_A), *_ = ended
    told = [(x_TD, fields[2], index_A) for x_TD, fields, (index_A, _) in zip(encoded, rows, ended)]
    reach = min(module.max_length, batch.tokens_BL.shape[1])
    one_AK, other_AK = (lay_out(*view, reach) for view in told[1:])
    mean_AD, *mean_views = (means(*one) for one in told)
    intent_AD = module.apply({'params': params}, mean_AD, method='nearest_intents')
    pairs = [(one_AK, other_AK, contrast_weight)]
    pairs += [(mean_AD, intent_AD, intent_weight / 2) for mean_AD in mean_views]
    for x_AK, y_AK, weight in pairs:
        term = losses.two_view_contrast(x_AK, y_AK, real_A, contrast_temperature)
        loss = views.add_term(loss, term, weight)
    return loss

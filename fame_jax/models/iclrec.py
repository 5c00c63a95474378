"""ICLRec (Chen et al., WWW 2022, arXiv 2202.02519): SASRec with contrast of histories and intents.

    E-step, before each epoch: k-means of mean f(s) over all training histories gives the intents
    M-step: L = L_rec + lambda L_inst + beta L_intent
    L_inst   = NTXent(f(v1), f(v2))        two views of a history, all positions concatenated
    L_intent = 1/2 [NTXent(mean f(v1), c) + NTXent(mean f(v2), c)],   c the intent nearest mean f(s)

with f SASRec's last block. As in the authors' code, not the paper: histories of one intent are each
other's negatives in L_intent and L_inst (its option to exclude them is off in its scripts), so that
a shared intent is in the denominator once for each of its histories.

The authors' code differs: its L_rec is binary cross-entropy with one negative; means are over 50
positions, padding included, here over a history's items; k-means is the best of five random starts,
here one start of k-means++; the nearest intent is computed with the centroids before they are
scaled to unit length, here after; f runs again on the views for each contrast, with new dropout,
here once for both. A view whose last item is masked has an empty last column there; here a view
ends with its last remaining item.
"""

import functools
import warnings
from collections.abc import Iterable
from typing import Annotated, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fame_jax import losses
from fame_jax.batch import Batch
from fame_jax.losses import LossOptions
from fame_jax.models import augmentations, kmeans, layers
from fame_jax.models.item_model import unit
from fame_jax.models.objective import add_term, inputs, target_loss
from fame_jax.models.options import Count, Range, Share, Temperature, Weight
from fame_jax.models.sasrec import SASRec

Array = jax.Array


class ICLRec(SASRec):
    """SASRec with the intents of histories, a parameter that `before_epoch` sets.

    The shares are those of the authors' scripts, run_*.sh.

    Attributes:
      num_clusters: intents.
      crop_share: share of a history that a crop keeps.
      mask_share: share of its items that are removed, as if they were padding.
      reorder_share: share of it that is shuffled.
      contrast_weight: lambda, of the contrast of views.
      contrast_temperature: of both contrasts.
      contrast_anchors: the most histories that are contrasted in a step; the first ones are taken.
      intent_weight: beta, of the contrast with intents.
    """

    num_clusters: Count = 256
    crop_share: Share = 0.2
    mask_share: Share = 0.7
    reorder_share: Share = 0.2
    contrast_weight: Weight = 0.1
    contrast_temperature: Temperature = 1.0
    contrast_anchors: Annotated[int, Range(2, 1_000_000)] = 128
    intent_weight: Weight = 0.1

    title: ClassVar[str] = 'ICLRec'
    frozen_params: ClassVar[tuple[str, ...]] = ('intents',)

    def setup(self) -> None:
        super().setup()
        shape_CD = (self.num_clusters, self.width)
        self.intent_table = self.param('intents', layers.normal_init, shape_CD)

    @nn.nowrap
    def before_epoch(self, params: dict, batches: Iterable[Batch], key: Array) -> dict:
        """The E-step: the parameters with this epoch's intents.

        Args:
          params: the model's parameters.
          batches: of one epoch.
          key: consumed, for the seeds of k-means.

        Returns:
          The same parameters but for 'intents', the centroids scaled to unit length. If there are
          fewer histories than intents, intents are repeated and a warning says so.
        """
        parts = (jax.device_get(_history_means(self, params, batch)) for batch in batches)
        mean_ND = np.concatenate([mean_AD[real_A] for mean_AD, real_A in parts])
        clusters = min(self.num_clusters, len(mean_ND))
        if clusters < self.num_clusters:
            warnings.warn(
                f'num_clusters={self.num_clusters} is more than the {clusters} training histories; '
                'some clusters are copies of others',
                stacklevel=2,
            )
        fitted = kmeans.fit(key, mean_ND, np.ones(len(mean_ND)), clusters=clusters)
        copied_CD = unit(fitted.centroid_CD)[np.arange(self.num_clusters) % clusters]
        return params | {'intents': copied_CD}

    @nn.nowrap
    def objective(
        self, params: dict, batch: Batch, key: Array, loss: LossOptions
    ) -> tuple[Array, Array, dict[str, Array]]:
        """The loss of the next item plus the weighted contrasts of views and of intents.

        Arguments and results are those of `ItemModel.objective`; the metrics are 'contrast', of
        the views, and 'intent_contrast', the mean over both views.
        """
        view_key, dropout_key, negative_key = jax.random.split(key, 3)
        operators = (
            functools.partial(augmentations.crop, share=self.crop_share),
            functools.partial(augmentations.mask, share=self.mask_share, mask_id=0),
            functools.partial(augmentations.reorder, share=self.reorder_share),
        )
        views = augmentations.two_views(view_key, inputs(batch), operators, different=False)
        rows = inputs(batch), *views
        encoded = augmentations.encode(self, params, dropout_key, *rows)
        query_TD = self.comparable(encoded[0], self.temperature)
        total, weight = target_loss(
            self,
            query_TD.reshape(*batch.tokens_BL.shape, -1),
            self.item_transform(params['item_table']),
            batch,
            negative_key,
            loss,
            item_transform=losses.identity,
        )
        # A view keeps every history, so the ends of all three are in the same order.
        ended = [augmentations.ends(segments_BL, self.contrast_anchors) for *_, segments_BL in rows]
        (_, real_A), *_ = ended
        histories = [
            (x_TD, segments_BL, index_A)
            for x_TD, (*_, segments_BL), (index_A, _) in zip(encoded, rows, ended)
        ]
        length = min(self.max_length, batch.tokens_BL.shape[1])
        one_AK, other_AK = (concatenate_positions(*view, length) for view in histories[1:])
        mean_AD, *view_means = (history_means(*history) for history in histories)
        intent_AD = nearest_intents(mean_AD, params['intents'])
        temperature = self.contrast_temperature
        term = losses.two_view_contrast(one_AK, other_AK, real_A, temperature)
        total, contrast = add_term(total, weight, term, self.contrast_weight)
        intent_contrast = jnp.float32(0)
        for view_AD in view_means:
            term = losses.two_view_contrast(view_AD, intent_AD, real_A, temperature)
            total, mean = add_term(total, weight, term, self.intent_weight / 2)
            intent_contrast += mean / 2
        return total, weight, {'contrast': contrast, 'intent_contrast': intent_contrast}


def nearest_intents(mean_AD: Array, intent_CD: Array) -> Array:
    """The intent nearest to the mean of each history's encodings, float32 [A, D]; no gradient."""
    intent_CD = jax.lax.stop_gradient(intent_CD)
    return intent_CD[kmeans.nearest(jax.lax.stop_gradient(mean_AD), intent_CD)]


@functools.partial(jax.jit, static_argnums=0)
def _history_means(module: ICLRec, params: dict, batch: Batch) -> tuple[Array, Array]:
    """The mean encoding of each history of a batch, [A, D], and bool [A], which are histories."""
    h_BLD, _ = module.apply({'params': params}, *inputs(batch), method='encode')
    index_A, real_A = augmentations.ends(batch.segments_BL, batch.segments_BL.size)
    return history_means(h_BLD.reshape(-1, h_BLD.shape[-1]), batch.segments_BL, index_A), real_A


def history_means(h_TD: Array, segments_BL: Array, index_A: Array) -> Array:
    """The mean encoding of the history of each position, given by index in T; float32 [A, D]."""
    same_BQS = (segments_BL[:, :, None] == segments_BL[:, None, :]).astype(jnp.float32)
    h_BSD = h_TD.reshape(*segments_BL.shape, -1).astype(jnp.float32)
    mean_BQD = jnp.einsum('BQS,BSD->BQD', same_BQS, h_BSD) / same_BQS.sum(axis=2, keepdims=True)
    return mean_BQD.reshape(h_TD.shape)[index_A]


def concatenate_positions(h_TD: Array, segments_BL: Array, index_A: Array, length: int) -> Array:
    """All positions of the histories that end at the given indices in T, one vector each.

    Returns:
      float32 [A, C D] with C = `length`; a history's last position comes last, and missing
      positions are zeros.
    """
    segment_T = jnp.asarray(segments_BL).reshape(-1)
    back_C = jnp.arange(length)[::-1]
    index_AC = index_A[:, None] - back_C[None, :]
    in_row_AC = (index_A % segments_BL.shape[1])[:, None] >= back_C[None, :]
    own_AC = in_row_AC & (segment_T[index_AC] == segment_T[index_A][:, None])
    h_ACD = jnp.where(own_AC[..., None], h_TD[index_AC].astype(jnp.float32), 0)
    return h_ACD.reshape(len(index_A), -1)

"""Training losses: arrays in, (weighted sum, sum of weights) out.

Read `cross_entropy.py` first: the loss over the whole catalogue, and which of its four forms is
used when. Then `chunked.py` (items in chunks), `multi_query.py` (several queries per token),
`sampled.py` (a few negatives) and `contrastive.py` (vectors against each other). `labels.py` makes
soft labels and weighs seen items. `ops.py` has the building blocks, `options.py` the record from
which an objective chooses its loss.

Letters are those of `batch.py`, and R: negatives of a token, or negatives shared by all tokens; F:
targets of a soft label.
Item tables have V + 1 rows; row 0 is the padding, which is never a target, takes no part in any
softmax and gets no gradient. A score is the inner product of a query and an item vector; the caller
applies similarity and temperature to the two. Queries and tables are float32 or bfloat16: products
take them in their dtype, and everything after a product is float32.

`weight_T` is the weight of each token: 0 where there is nothing to predict, and only there may
`target_T` be 0. The caller divides the weighted sum by the sum of the weights.

A loss with an argument `item_transform` takes table rows instead of item vectors:
`item_transform`, [n, D] -> [n, D], turns rows into vectors, each row on its own. Only the rows that
are needed at a time are transformed, so a large table needs neither a second table of vectors nor a
second gradient. It must be the same function object in every call, since programs are cached by it.
"""

from fame_jax.losses.contrastive import label_overlap, supervised_contrastive, two_view_contrast
from fame_jax.losses.cross_entropy import cross_entropy
from fame_jax.losses.labels import future_targets, log_seen
from fame_jax.losses.multi_query import multi_query_cross_entropy
from fame_jax.losses.ops import identity
from fame_jax.losses.options import LossOptions
from fame_jax.losses.sampled import (
    binary_cross_entropy,
    cumulative_counts,
    draw_negatives,
    draw_popular,
    sampled_cross_entropy,
)

__all__ = [
    'LossOptions',
    'binary_cross_entropy',
    'cross_entropy',
    'cumulative_counts',
    'draw_negatives',
    'draw_popular',
    'future_targets',
    'identity',
    'label_overlap',
    'log_seen',
    'multi_query_cross_entropy',
    'sampled_cross_entropy',
    'supervised_contrastive',
    'two_view_contrast',
]

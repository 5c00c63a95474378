"""What a recommender is trained on: plain arrays in, (sum, count) out, divided once by the caller.

Letters are those of `batch.py`, and R: negatives drawn for a token, or shared by all of them. Item
tables have V + 1 rows; row 0, the padding, is nobody's target, takes no part in any softmax and
receives no gradient. Scores are inner products of a query and a row; a cosine or a temperature is
folded into the two by the caller. Every function accepts float32 or bfloat16 queries and tables,
multiplies them as they are, and does everything after the product in float32.

`weight_T` says how much a token counts: 0 where there is nothing to predict, and only there may
`target_T` be 0. The count is the sum of the weights, so `sum / max(count, 1)` is a mean.

Where a loss takes `prepare`, the table holds raw rows and `prepare`, [n, D] -> [n, D], makes the
vectors of any of them, each row by itself. Only the rows at hand are ever prepared, so that a large
table needs no second one, nor a second gradient. It has to be the same function every time, or a
program is compiled anew.
"""

from fame_jax.losses.combined import combined_cross_entropy
from fame_jax.losses.contrastive import label_overlap, supervised_contrastive, two_view_contrast
from fame_jax.losses.divided import divided_cross_entropy
from fame_jax.losses.full import chunked_cross_entropy, cross_entropy
from fame_jax.losses.pieces import as_they_are
from fame_jax.losses.sampled import (
    binary_cross_entropy,
    cumulate,
    draw_negatives,
    draw_popular,
    sampled_cross_entropy,
)

__all__ = [
    'as_they_are',
    'binary_cross_entropy',
    'chunked_cross_entropy',
    'combined_cross_entropy',
    'cross_entropy',
    'cumulate',
    'divided_cross_entropy',
    'draw_negatives',
    'draw_popular',
    'label_overlap',
    'sampled_cross_entropy',
    'supervised_contrastive',
    'two_view_contrast',
]

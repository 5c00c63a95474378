"""The dimension letters, and the batches that models are trained on.

    B  rows of a batch                   H  heads, one per facet
    L  positions of a row                K  width of a head, D / H
    D  width of the model                N  experts of a head
    V  items; id 0 is padding            M  facets known from metadata
    U  users                             T  tokens: B * L in one axis
    E  width of a text vector            C  labels of a facet
    Q, S  query and source positions, where attention has two axes of L
    P, S  labels of a batch and items of each; S also the slots for an item's labels, and runs that
          train together

A name ends with its letters (`query_BLD`), and einsum strings use the same letters. Tables indexed
by item id have V + 1 rows, with row 0 for the padding; their names still end with V.
"""

from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """Rows of packed histories: several users' histories one after the other in a row.

    The histories 7 8 9 and 4 5, packed in one row of six positions:

        tokens     7 8 4 0 0 0        the last item of a history is only a target
        positions  0 1 0 0 0 0        from the start of the history
        segments   1 1 2 0 0 0        the number of the history in its row; 0 is padding
        targets    8 9 5 0 0 0        the next item
        weights    1 1 1 0 0 0        0 where there is nothing to predict

    Fields are [B, L]; weights float32, the others int32. A history is contiguous in its row, so the
    distance between two items of a segment is the difference of their columns.
    """

    tokens_BL: np.ndarray
    positions_BL: np.ndarray
    segments_BL: np.ndarray
    targets_BL: np.ndarray
    weights_BL: np.ndarray


class PairedBatch(NamedTuple):
    """A Batch, and for some positions a second prefix with the same target, the positive of DuoRec.

    The fields with `pair_` are the rows of these prefixes, in the number and length of the batch's
    own rows. `anchor_BL`, int32, links the two: at the last column of a prefix it is the position
    that the prefix is the positive of, as row * L + column in the batch's own rows, elsewhere -1. A
    history has at most one such position.
    """

    tokens_BL: np.ndarray
    positions_BL: np.ndarray
    segments_BL: np.ndarray
    targets_BL: np.ndarray
    weights_BL: np.ndarray
    pair_tokens_BL: np.ndarray
    pair_positions_BL: np.ndarray
    pair_segments_BL: np.ndarray
    anchor_BL: np.ndarray

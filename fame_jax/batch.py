"""The key of dimension letters, and the one record that is called a batch.

    B  rows in a batch                   H  heads, one per facet
    L  positions in a row                K  width of a head, D / H
    D  width of the model                N  experts in a head
    V  items; id 0 is padding            M  facets known from metadata
    U  users                             T  tokens, B * L laid end to end
    E  width of a text vector            C  labels of a facet
    Q, S  query and source positions where attention needs to tell two L apart
    P, S  labels in a batch and items of each; S also the slots of an item's labels

A name ends with its letters (`query_BLD`), and einsum strings use the same ones. Tables that are
indexed by item id have V + 1 rows, row 0 for the padding; their names still end with V.
"""

from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """Rows of histories, several users' histories end to end in one row.

    Two histories, 7 8 9 and 4 5, packed in one row of six positions:

        tokens     7 8 4 0 0 0        the last item of a history is only a target
        positions  0 1 0 0 0 0        from the start of the history
        segments   1 1 2 0 0 0        which history of the row; 0 is padding
        targets    8 9 5 0 0 0        the item that follows
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
    """A Batch and companions: prefixes that have the same target as one position of a history.

    The companion rows lie beside the batch's own, as many and as long. `anchor_BL` is -1 but at a
    companion's last column, where it is the position that the companion belongs to: row * L +
    column, in the batch's own rows. A history has one companion at the most.
    """

    tokens_BL: np.ndarray
    positions_BL: np.ndarray
    segments_BL: np.ndarray
    targets_BL: np.ndarray
    weights_BL: np.ndarray
    pair_tokens_BL: np.ndarray
    pair_positions_BL: np.ndarray
    pair_segments_BL: np.ndarray
    anchor_BL: np.ndarray  # int32

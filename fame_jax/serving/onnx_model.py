"""A recommender as model.onnx: item indices in, scores of all items out, for other languages.

    items   int32 [B, L]        indices of a history's items, oldest first; L is max_length
    scores  float32 [B, V + 1]  by item index; the padding, index 0, has -inf

The row of an item in ids.json is its index. Entries that are no index, 0 for instance, are skipped
wherever they stand. A row without any item gets the numbers of actions, as `recommend` falls back
to the most popular items. Items of the history are not left out; that is up to the caller.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fame_jax.errors import explain_os_errors
from fame_jax.serving import onnx_graph, rows, topk
from fame_jax.serving.recommender import Recommender

Array = jax.Array

FILE, INPUT, OUTPUT = 'model.onnx', 'items', 'scores'

# The largest difference from the recommender's scores, relative to the largest score. Wider than
# rounding on a CPU: a GPU multiplies float32 with fewer digits, and the graph does not.
TOLERANCE = {'float32': 1e-2, 'bfloat16': 5e-2}


def scores_function(recommender: Recommender) -> Callable[[Array], Array]:
    """The function of the file, int32 items [B, L] -> float32 scores [B, V + 1]."""
    model, num_items = recommender.model, recommender.num_items
    count_V = jnp.asarray(recommender.count_V, jnp.float32)

    def scores(items_BL: Array) -> Array:
        tokens_BL, positions_BL, segments_BL = align(items_BL, num_items)
        query_BQD = model.encode(model.params, tokens_BL, positions_BL, segments_BL)
        score_BQV = jnp.einsum(
            'BQD,VD->BQV', query_BQD, model.item_VD, preferred_element_type=jnp.float32
        )
        # Every row with an item ends with one.
        is_known_B1 = segments_BL[:, -1:] > 0
        score_BV = jnp.where(is_known_B1, model.combine(score_BQV), count_V[None])
        return jnp.where(jnp.arange(num_items + 1)[None] > 0, score_BV, -jnp.inf)

    return scores


def align(items_BL: Array, num_items: int) -> tuple[Array, Array, Array]:
    """Tokens, positions and segments of rows whose items may stand anywhere.

    Args:
      items_BL: int32; values outside of 1 to V are skipped.
      num_items: V.

    Returns:
      Three int32 [B, L], as `rows.HistoryRows` has them.
    """
    length = items_BL.shape[1]
    is_item_BL = (items_BL > 0) & (items_BL <= num_items)
    count_BL = jnp.cumsum(is_item_BL.astype(jnp.int32), axis=1)
    before_B1 = length - count_BL[:, -1:]
    column_1P1 = jnp.arange(length)[None, :, None]
    is_source_BPL = is_item_BL[:, None] & ((before_B1 + count_BL - 1)[:, None] == column_1P1)
    tokens_BL = jnp.sum(jnp.where(is_source_BPL, items_BL[:, None], 0), axis=2)
    positions_BL = jnp.maximum(jnp.arange(length)[None] - before_B1, 0)
    return tokens_BL, positions_BL, (tokens_BL > 0).astype(jnp.int32)


def write(recommender: Recommender, folder: Path) -> str:
    """Writes model.onnx, after a comparison of its scores with the recommender's.

    Args:
      recommender: on one device.
      folder: of the export.

    Returns:
      '', or one line that says why there is no model.onnx.

    Raises:
      UserError: if the file cannot be written.
    """
    model = recommender.model
    if model.onnx_file is not None:
        return _copy(model.onnx_file, folder / FILE)
    if importlib.util.find_spec('onnx') is None:
        return f"no {FILE}, which needs the package onnx: pip install 'fame_jax[onnx]'"
    try:
        made = onnx_graph.convert(scores_function(recommender), model.max_length, INPUT, OUTPUT)
    except onnx_graph.NotConvertible as error:
        return f'no {FILE}: {error}'
    difference = _difference(recommender, made)
    if not difference <= TOLERANCE[str(model.item_VD.dtype)]:  # a NaN is refused too
        return f'no {FILE}: its scores would differ by {difference:.2g} of the largest score'
    with explain_os_errors(f'writing {folder / FILE}'):
        (folder / FILE).write_bytes(made.SerializeToString())
    return ''


def _copy(source: Path, path: Path) -> str:
    """Copies the file of the export that the recommender was read from, if it still is there."""
    if not source.is_file():
        return f'no {FILE}: the export {source.parent} has none; export the run itself again'
    try:
        content = source.read_bytes()
    except OSError as error:
        return f'no {FILE}: {source} can no longer be read ({error.strerror})'
    with explain_os_errors(f'writing {path}'):
        path.write_bytes(content)
    return ''


def _difference(recommender: Recommender, made: Any) -> float:
    """The largest difference of a graph's scores, relative to the largest, for a few histories."""
    from onnx.reference import ReferenceEvaluator

    model, draw = recommender.model, np.random.default_rng(0)
    lengths = [1, max(1, model.max_length // 2), model.max_length]
    histories = [
        draw.integers(1, recommender.num_items + 1, length).astype(np.int32) for length in lengths
    ]
    items_BL = np.zeros((len(histories), model.max_length), np.int32)
    score_BV = np.zeros((len(histories), recommender.num_items + 1), np.float32)
    for row, history in enumerate(histories):
        items_BL[row, : len(history)] = history
        (batch,) = rows.batches([history], model.max_length, 1)
        found = topk.score_all(model.combine, recommender.encode(batch), model.item_VD)
        score_BV[row] = np.asarray(found)[0]
    (other_BV,) = ReferenceEvaluator(made).run([OUTPUT], {INPUT: items_BL})
    largest = max(1e-6, float(np.abs(score_BV[:, 1:]).max()))
    return float(np.abs(other_BV - score_BV)[:, 1:].max()) / largest

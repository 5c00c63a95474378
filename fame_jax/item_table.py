"""What a model's item table starts from, where that is not chance."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fame_jax.encoder import read_vectors
from fame_jax.errors import UserError, explain_os_errors

Tree = Mapping[str, Any]


class Start(NamedTuple):
    """Vectors to start from.

    Fields:
      items_VD: float32 [V + 1, D], a row an item, zeros where nothing is known of it.
      facet_HDK: float32 [H, D, K], the W_f that reads them, or None where head h reads slice h.
    """

    items_VD: np.ndarray
    facet_HDK: np.ndarray | None = None


def read(source: str, folder: Path, num_items: int, width: int) -> Start:
    """Reads what --item_init names: 'text', a run's own text stage, or an .npy.

    Args:
      source: 'text' or the path of an .npy.
      folder: the run's text/ folder.
      num_items: V.
      width: D.

    Raises:
      UserError: when it is not there, or does not fit.
    """
    if source == 'text' and not (folder / 'text.json').is_file():
        raise UserError(f'{folder} holds no item vectors; run --stages=text first')
    path = folder / 'items.npy' if source == 'text' else Path(source)
    items_VD = read_vectors(path, num_items + 1)
    if items_VD.shape[1] != width:
        raise UserError(
            f'{path} has {items_VD.shape[1]} columns, and the item table --width={width}; give it '
            'as many'
        )
    items_VD[0] = 0  # the padding's
    facet = folder / 'facet.npy'
    if source != 'text' or not facet.is_file():
        return Start(items_VD)
    with explain_os_errors(f'reading {facet}'):
        return Start(items_VD, np.load(facet, allow_pickle=False))


def fill(params: Tree, start: Start, scale: float, training: str) -> dict[str, Any]:
    """Fresh parameters whose item table starts from the vectors.

    Args:
      params: as initialised; an item of which nothing is known keeps its random row.
      start: what to start from.
      scale: the root mean square that each row's coordinates get.
      training: as Config.item_training. Where a table by id is added to a frozen one, the frozen
        rows of items of which nothing is known are zero, so that they have the id alone.
    """
    length_V1 = np.linalg.norm(start.items_VD, axis=1, keepdims=True)
    known_V1 = length_V1 > 0
    size = scale * np.sqrt(start.items_VD.shape[1])
    row_VD = start.items_VD / np.where(known_V1, length_V1, 1) * size
    name = 'item_table' if training == 'trained' else 'frozen_table'
    rest_VD = 0 if training == 'added' else np.asarray(params[name])
    table_VD = np.where(known_V1, row_VD, rest_VD)
    return {**params, name: jnp.asarray(table_VD, params[name].dtype)}


def align(params: Tree, start: Start) -> dict[str, Any]:
    """FAME's parameters with the W_f that reads the vectors, if they came with one."""
    if start.facet_HDK is None:
        return dict(params)
    block = params['facet_block']
    facet_HDK = jnp.asarray(start.facet_HDK, block['facet'].dtype)
    return {**params, 'facet_block': {**block, 'facet': facet_HDK}}

"""What a model's item table starts from, where that is not chance; and the folder it lies in.

The stage text leaves in a run's folder, below text/:

    items.npy      float32 [V + 1, D], a row an item; zeros where an item has no text
    facet.npy      float32 [H, D, K], W_f, of the shared design alone
    labels.npz     int32 [V + 1, S] for each facet, and its labels' names
    text.json      where texts and labels came from, how many, and what the heads tell apart
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fame_jax.encoder import read_vectors
from fame_jax.errors import UserError, explain_os_errors
from fame_jax.records import read_json
from fame_jax.sharding import TABLES, whole

Tree = Mapping[str, Any]

FILES = ('items.npy', 'labels.npz', 'text.json')


class Start(NamedTuple):
    """Vectors to start from.

    Fields:
      items_VD: float32 [V + 1, D], a row an item, zeros where nothing is known of it.
      facet_HDK: float32 [H, D, K], the W_f that reads them, or None where head h reads slice h.
    """

    items_VD: np.ndarray
    facet_HDK: np.ndarray | None = None


def is_made(folder: Path, data_sha256: str) -> bool:
    """Whether a text/ folder is whole.

    Args:
      folder: text/ of a run.
      data_sha256: fingerprint of the data that it must be of.

    Raises:
      UserError: when it was made of other data.
    """
    if not all((folder / name).is_file() for name in FILES):
        return False
    told = read_json(folder / 'text.json')
    if not isinstance(told, dict) or told.get('data_sha256') != data_sha256:
        raise UserError(
            f'{folder} was made of other data than its run holds; take the two from one run, or '
            'remove it and run --stages=text'
        )
    return True


def read(source: str, folder: Path, num_items: int, width: int, data_sha256: str) -> Start:
    """Reads what --item_init names: 'text', a run's own text stage, or an .npy.

    Args:
      source: 'text', or the path of an .npy; facet.npy beside it is read too.
      folder: the run's text/ folder.
      num_items: V.
      width: D.
      data_sha256: fingerprint of the run's data.

    Raises:
      UserError: when it is not there, or does not fit.
    """
    if source == 'text' and not is_made(folder, data_sha256):
        raise UserError(f'{folder} holds no item vectors; run --stages=text first')
    path = folder / 'items.npy' if source == 'text' else Path(source)
    items_VD = read_vectors(path, num_items + 1)
    if items_VD.shape[1] != width:
        raise UserError(
            f'{path} has {items_VD.shape[1]} columns, and the item table --width={width}; give it '
            'as many'
        )
    items_VD[0] = 0  # the padding's
    facet = path.with_name('facet.npy')
    return Start(items_VD, _read_facet(facet, width) if facet.is_file() else None)


def _read_facet(path: Path, width: int) -> np.ndarray:
    try:
        with explain_os_errors(f'reading {path}'):
            facet_HDK = np.load(path, allow_pickle=False)
        num_heads = len(facet_HDK)
        if facet_HDK.shape != (num_heads, width, width // num_heads):
            raise ValueError('another shape')
    except (ValueError, EOFError, TypeError, ZeroDivisionError) as error:
        raise UserError(f'{path} is damaged; remove its folder and run --stages=text') from error
    return facet_HDK


def read_labels(folder: Path, num_items: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Each facet's label_VS and the names of its labels; empty without a text/ folder.

    Raises:
      UserError: when they are damaged, or of another catalogue.
    """
    path = folder / 'labels.npz'
    if not path.is_file():
        return {}
    try:
        with explain_os_errors(f'reading {path}'), np.load(path, allow_pickle=False) as file:
            facets = [name.removesuffix('/items') for name in file if name.endswith('/items')]
            labels = {f: (file[f'{f}/items'], file[f'{f}/names']) for f in facets}
        if any(len(label_VS) != num_items + 1 for label_VS, _ in labels.values()):
            raise ValueError('another number of items')
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f'{path} is damaged; remove its folder and run --stages=text') from error
    return labels


def fill(params: Tree, start: Start, scale: float, training: str) -> dict[str, Any]:
    """Fresh parameters whose item table starts from the vectors.

    Args:
      params: as initialised; an item of which nothing is known keeps its random row. A table that
        items are scored by apart from the one they are read from starts alike.
      start: what to start from.
      scale: the root mean square that each row's coordinates get.
      training: as Config.item_training. Where a table by id is added to a frozen one, the frozen
        rows of items of which nothing is known are zero, so that they have the id alone.
    """
    # A table that devices share may have rows that are nobody's item.
    missing = next(len(params[name]) for name in TABLES if name in params) - len(start.items_VD)
    items_VD = np.pad(start.items_VD, ((0, missing), (0, 0)))
    length_V1 = np.linalg.norm(items_VD, axis=1, keepdims=True)
    known_V1 = length_V1 > 0
    row_VD = items_VD / np.where(known_V1, length_V1, 1) * (scale * np.sqrt(items_VD.shape[1]))
    filled = dict(params)
    for name in ('item_table' if training == 'trained' else 'frozen_table', 'output_table'):
        if name in params:
            zero = training == 'added' and name == 'frozen_table'
            table_VD = np.where(known_V1, row_VD, 0 if zero else whole(params[name]))
            filled[name] = jnp.asarray(table_VD, params[name].dtype)
    return filled


def align(params: Tree, start: Start) -> dict[str, Any]:
    """FAME's parameters with the W_f that reads the vectors, if they came with one."""
    if start.facet_HDK is None:
        return dict(params)
    block = params['facet_block']
    if start.facet_HDK.shape != block['facet'].shape:
        raise UserError(
            f'the item vectors come with a W_f for {len(start.facet_HDK)} heads; use as many '
            'with --num_heads'
        )
    facet_HDK = jnp.asarray(start.facet_HDK, block['facet'].dtype)
    return {**params, 'facet_block': {**block, 'facet': facet_HDK}}

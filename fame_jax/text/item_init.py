"""The item table's initial rows: the vectors that the text stage writes, or any .npy file.

The text stage leaves in a run's folder, below text/:

    items.npy      float32 [V + 1, D], one row for each item; zeros for an item without text
    labels.npz     int32 [V + 1, S] for each facet, and the names of its labels
    text.json      sources and counts of texts and labels, and how well heads separate the facets
    vectors.npy    float32 [V + 1, E], the frozen text vectors, with --text_path alone

With --text_path and another --item_init there are no heads, and only the last two are there.
"""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from fame_jax.errors import UserError, explain_os_errors
from fame_jax.parallel.mesh import gather
from fame_jax.run_dir import atomic_write, read_json, write_json
from fame_jax.text.facets import Facet
from fame_jax.text.vectors import read_vectors

Tree = Mapping[str, Any]

FILES = ('items.npy', 'labels.npz', 'text.json')
VECTORS = 'vectors.npy'


def save(
    folder: Path, items_VD: np.ndarray, facets: Sequence[Facet], record: Mapping[str, Any]
) -> None:
    """Writes a text/ folder; text.json comes last, so that a folder that has it is complete.

    Args:
      folder: text/ of a run; created if it does not exist.
      items_VD: float32 [V + 1, D].
      facets: their labels.
      record: the content of text.json; 'data_sha256' identifies the data.

    Raises:
      UserError: when it cannot be written.
    """
    with explain_os_errors(f'making the folder {folder}'):
        folder.mkdir(exist_ok=True)
    with atomic_write(folder / 'items.npy') as file:
        np.save(file, items_VD.astype(np.float32))
    with atomic_write(folder / 'labels.npz') as file:
        arrays = {f'{facet.name}/items': facet.label_VS for facet in facets}
        names = {f'{facet.name}/names': np.array(facet.labels) for facet in facets}
        np.savez_compressed(file, **arrays, **names)
    write_json(folder / 'text.json', dict(record))


def save_vectors(folder: Path, text_VE: np.ndarray) -> None:
    """Writes the frozen text vectors into a text/ folder, which is made if it does not exist.

    Raises:
      UserError: when they cannot be written.
    """
    with explain_os_errors(f'making the folder {folder}'):
        folder.mkdir(exist_ok=True)
    with atomic_write(folder / VECTORS) as file:
        np.save(file, text_VE.astype(np.float32))


def read_text_vectors(folder: Path, num_items: int, data_sha256: str) -> np.ndarray:
    """Reads the frozen text vectors, float32 [V + 1, E]; zeros for an item without text.

    Args:
      folder: text/ of a run.
      num_items: V.
      data_sha256: of the run's data.

    Raises:
      UserError: when they are missing, damaged or of other data.
    """
    if not is_complete(folder, data_sha256, files=(VECTORS, 'text.json')):
        raise UserError(f'{folder} has no text vectors for --text_path; run --stages=text first')
    return read_vectors(folder / VECTORS, num_items + 1)


def is_complete(folder: Path, data_sha256: str, files: Sequence[str] = FILES) -> bool:
    """Whether a text/ folder has all its files.

    Args:
      folder: text/ of a run.
      data_sha256: of the run's data.
      files: names of those that the run needs.

    Raises:
      UserError: when it was made from other data.
    """
    if not has_files(folder, files):
        return False
    record = read_json(folder / 'text.json')
    if not isinstance(record, dict) or record.get('data_sha256') != data_sha256:
        raise UserError(
            f"{folder} was made from data other than the run's; take both from one run, or remove "
            'the folder and run --stages=text'
        )
    return True


def has_files(folder: Path, files: Sequence[str] = FILES) -> bool:
    """Whether a text/ folder has all these files, of whatever data."""
    return all((folder / name).is_file() for name in files)


def read(source: str, folder: Path, num_items: int, width: int, data_sha256: str) -> np.ndarray:
    """Reads the vectors of --item_init, float32 [V + 1, D]; zeros for an item without a vector.

    Args:
      source: 'text' for the run's own text stage, or the path of an .npy file.
      folder: text/ of the run.
      num_items: V.
      width: D.
      data_sha256: of the run's data.

    Raises:
      UserError: when the file is missing, damaged or of another shape.
    """
    if source == 'text' and not is_complete(folder, data_sha256):
        raise UserError(f'{folder} has no item vectors; run --stages=text first')
    path = folder / 'items.npy' if source == 'text' else Path(source)
    items_VD = read_vectors(path, num_items + 1)
    if items_VD.shape[1] != width:
        raise UserError(
            f'{path} has {items_VD.shape[1]} columns, and the item table has --width={width}; make '
            'the two equal'
        )
    items_VD[0] = 0  # padding
    return items_VD


def read_labels(folder: Path, num_items: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Each facet's label_VS and the names of its labels; empty where there is no text/ folder.

    Raises:
      UserError: when the file is damaged or has another number of items.
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


def fill(params: Tree, items_VD: np.ndarray, scale: float) -> dict[str, Any]:
    """Replaces rows of a freshly initialised item table by item vectors.

    Args:
      params: with 'item_table', which may have padding rows at its end, so that devices share it
        evenly.
      items_VD: float32 [V + 1, D]; where a row is zero, the table keeps its random row.
      scale: the root mean square of each row's coordinates in the table.
    """
    table = params['item_table']
    items_VD = np.pad(items_VD, ((0, len(table) - len(items_VD)), (0, 0)))
    length_V1 = np.linalg.norm(items_VD, axis=1, keepdims=True)
    known_V1 = length_V1 > 0
    row_VD = items_VD / np.where(known_V1, length_V1, 1) * (scale * np.sqrt(items_VD.shape[1]))
    table_VD = np.where(known_V1, row_VD, gather(table))
    return {**params, 'item_table': jnp.asarray(table_VD, table.dtype)}

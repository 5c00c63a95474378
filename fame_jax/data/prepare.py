"""A known data set or a file to a Dataset: read, then build."""

import glob
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from fame_jax.data import download
from fame_jax.data.build import build_dataset
from fame_jax.data.dataset import K_CORE, MIN_RATING, Dataset
from fame_jax.data.sources import suggest
from fame_jax.data.synthetic import OPTIONS, generate
from fame_jax.errors import UserError, explain_os_errors

ROLES = ('user', 'item', 'time', 'rating')


def prepare(
    dataset: str,
    *,
    data_dir: str = '',
    columns: Mapping[str, str] | None = None,
    min_rating: float = MIN_RATING,
    k_core: int = K_CORE,
    max_user_actions: int = 0,
    duplicates: Literal['keep', 'drop'] = 'keep',
    synthetic: Mapping[str, int] | None = None,
) -> Dataset:
    """Makes a Dataset of a known data set, of a file, or of generated data.

    Args:
      dataset: a known name, 'synthetic', or the path of a sequence file or log.
      data_dir: the folder of known data sets; empty: $FAME_JAX_DATA, then the cache folder.
      columns: names of a log's columns by 'user', 'item', 'time' and 'rating'. A column that is
        missing here, or '', is recognised by its name.
      min_rating: actions with a lower rating are removed; 0 keeps all.
      k_core: users and items with fewer actions are removed until none is left; 0 or 1 keeps all.
      max_user_actions: earlier actions of a user with more of them are removed; 0 keeps all.
      duplicates: 'drop' removes actions whose user, item and time are those of another.
      synthetic: arguments of `synthetic.generate`, see OPTIONS there. Generated data is not
        filtered.

    Raises:
      UserError: on an unknown name, a faulty file, or where the filters leave nothing.
    """
    columns, synthetic = dict(columns or {}), dict(synthetic or {})
    _check_names('--columns', columns, ROLES)
    _check_names('--synthetic', synthetic, OPTIONS)
    if dataset == 'synthetic':
        if any(columns.values()):
            raise UserError('--columns: synthetic data has no columns; leave them out')
        return generate(**synthetic)
    # polars takes a while to import, and synthetic data does not need it.
    from fame_jax.data.readers import read_log

    path = find_file(dataset, data_dir)
    if dataset in download.KNOWN and not path.name.endswith(('.txt', '.txt.gz')):
        columns = dict(download.KNOWN[dataset].columns) | columns
    return build_dataset(
        read_log(path, columns, needs_rating=min_rating > 0),
        dataset if dataset in download.KNOWN else path.name,
        k_core=k_core,
        min_rating=min_rating,
        max_user_actions=max_user_actions,
        duplicates=duplicates,
    )


def find_file(dataset: str, data_dir: str = '') -> Path:
    """Returns the file of a known data set (downloaded if need be), or of a path.

    Raises:
      UserError: if it is neither.
    """
    if dataset in download.KNOWN:
        return download.locate(dataset, data_dir)
    with explain_os_errors(f'looking for {dataset[:80]!r}', 'check --dataset'):
        for path in (Path(dataset).expanduser(), Path(data_dir).expanduser() / dataset):
            if dataset and (path.exists() or glob.glob(str(path))):
                return path
    names = [*download.KNOWN, 'synthetic']
    if os.sep in dataset or Path(dataset).suffix:
        raise UserError(f'{dataset}: no such file; check the path (known: {", ".join(names)})')
    raise UserError(f'unknown data set {dataset!r} and no such file; {suggest(dataset, names)}')


def _check_names(option: str, given: Mapping[str, object], known: tuple[str, ...]) -> None:
    for name in given:
        if name not in known:
            raise UserError(f'{option}: there is no {name!r}; {suggest(name, known)}')

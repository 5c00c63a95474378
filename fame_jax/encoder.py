"""Texts as vectors: by hashed TF-IDF, by a model from a folder, or read from a file.

A model's vectors are kept on disk by model and text, so that only new texts are encoded.
"""

import hashlib
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from fame_jax import text_model
from fame_jax.data import tfidf
from fame_jax.errors import UserError, explain_os_errors
from fame_jax.records import replacing

Say = Callable[[str], None]


def encode(
    texts: Sequence[str],
    encoder: str,
    *,
    cache: Path,
    width: int = 256,
    progress: bool = False,
    say: Say = lambda line: None,
) -> np.ndarray:
    """Vectors of items' texts.

    Args:
      texts: one an item, in the order of the rows.
      encoder: 'tfidf', a model's folder, or a .npy file that already holds the vectors.
      cache: folder where a model's vectors are kept; made if need be.
      width: columns of 'tfidf'; the others have a width of their own.
      progress: whether to show a bar on stderr.
      say: is told, in a line, what a person may want to know.

    Returns:
      float32 [len(texts), D_t]. An item without any text has a row of zeros, unless a file says
      otherwise.

    Raises:
      UserError: when the encoder is none of the three or cannot be read, or the cache written.
    """
    path = Path(encoder)
    if encoder == 'tfidf':
        return tfidf.vectors(texts, width)
    if path.suffix == '.npy':
        return read_vectors(path, len(texts))
    if not path.is_dir():
        raise UserError(
            f'{encoder}: no such text encoder; give tfidf, a folder with config.json, '
            'model.safetensors and tokenizer.json, or a .npy file'
        )
    return _encode_with_model(texts, path, cache, progress, say)


def _encode_with_model(
    texts: Sequence[str], folder: Path, cache: Path, progress: bool, say: Say
) -> np.ndarray:
    settings = text_model.read_settings(folder)
    path = cache / f'text-{text_model.digest(settings)[:32]}.npz'
    width = settings.module.width
    known = _read_cache(path, width, say)
    keys = {text: hashlib.sha256(text.encode()).hexdigest() for text in texts if text.strip()}
    new = [text for text, key in keys.items() if key not in known]
    if new:
        model = text_model.load(settings)
        say(f'text: encoding {len(new):,} of {len(keys):,} different texts')
        try:
            for rows, vector_BD in text_model.embed_batches(model, new, progress):
                known |= {keys[new[row]]: vector for row, vector in zip(rows, vector_BD)}
        finally:
            # What is done by the time of a Ctrl-C need not be done again.
            _write_cache(path, known, width)
    blank = np.zeros(width, np.float32)
    rows = [known[keys[text]] if text in keys else blank for text in texts]
    return np.stack(rows) if rows else np.zeros((0, width), np.float32)


def read_vectors(path: Path, count: int) -> np.ndarray:
    """Vectors from a .npy file, as float32 [count, D_t].

    Raises:
      UserError: when it is not such a file, has other than `count` rows, or entries that are no
        finite numbers.
    """
    with explain_os_errors(f'reading {path}'):
        try:
            table = np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise UserError(f'{path}: not a .npy of numbers, or cut short; save it anew') from error
    if not isinstance(table, np.ndarray) or table.ndim != 2 or table.dtype.kind != 'f':
        told = f'{table.dtype} {table.shape}' if isinstance(table, np.ndarray) else 'an archive'
        raise UserError(f'{path}: holds {told}; wanted are floats [{count}, width]')
    if len(table) != count or not table.shape[1]:
        raise UserError(
            f'{path}: shape {table.shape}, and {count} rows are wanted: one for the padding, then '
            'one an item, in the order of dataset/ids.json'
        )
    with np.errstate(over='ignore'):
        table = table.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(table).all(axis=1))
    if len(bad):
        raise UserError(
            f'{path}: {len(bad)} rows hold what is no finite float32, the first is row {bad[0]} '
            '(from 0); mend them'
        )
    return table


def _read_cache(path: Path, width: int, say: Say) -> dict[str, np.ndarray]:
    """SHA-256 of a text, in hexadecimal -> its vector; nothing where the file is damaged."""
    if not path.exists():
        return {}
    try:
        with np.load(path, allow_pickle=False) as file:
            keys, vectors = file['keys'], file['vectors']
        if vectors.shape != (len(keys), width) or not np.isfinite(vectors).all():
            raise ValueError('other sizes than it should have')
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        say(f'text: {path} is damaged ({error}); its vectors are computed and written again')
        return {}
    return dict(zip(keys.tolist(), vectors))


def _write_cache(path: Path, known: dict[str, np.ndarray], width: int) -> None:
    with explain_os_errors(f'writing {path}'):
        path.parent.mkdir(parents=True, exist_ok=True)
    vectors = np.array(list(known.values()), np.float32).reshape(len(known), width)
    with replacing(path) as file:
        np.savez(file, keys=np.array(list(known), 'U64'), vectors=vectors)

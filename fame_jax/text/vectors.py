"""Text vectors: from TF-IDF, from a sentence encoder's folder, or read from an .npy file.

The vectors of a sentence encoder are cached on disk by encoder and text, so that only new texts are
encoded.
"""

import hashlib
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from fame_jax.errors import UserError, explain_os_errors
from fame_jax.run_dir import atomic_write
from fame_jax.text import sentence_encoder, tfidf

Log = Callable[[str], None]


def encode(
    texts: Sequence[str],
    encoder: str,
    *,
    cache: Path,
    width: int = 256,
    progress: bool = False,
    log: Log = lambda line: None,
) -> np.ndarray:
    """Encodes texts as vectors.

    Args:
      texts: one for each row.
      encoder: 'tfidf', the folder of a sentence encoder, or an .npy file with the vectors.
      cache: folder of the sentence encoders' vectors; created if it does not exist.
      width: columns of 'tfidf'; the other two have a width of their own.
      progress: whether to show a bar on stderr.
      log: called with a line for the user.

    Returns:
      float32 [len(texts), E]. A text without characters other than blanks gives zeros, except in
      an .npy file.

    Raises:
      UserError: when the encoder is none of the three or cannot be read, or when the cache cannot
        be written.
    """
    path = Path(encoder)
    check_encoder(encoder)
    if encoder == 'tfidf':
        return tfidf.vectors(texts, width)
    if path.suffix == '.npy':
        return read_vectors(path, len(texts))
    return _encode_with_model(texts, path, cache, progress, log)


def check_encoder(encoder: str) -> None:
    """Checks that there is such an encoder; it reads none of its files.

    Raises:
      UserError: when it is neither 'tfidf' nor a folder nor a file.
    """
    path = Path(encoder)
    if path.suffix == '.npy':
        with explain_os_errors(f'--text_encoder={encoder}', 'check the path'):
            path.stat()
    elif encoder != 'tfidf' and not path.is_dir():
        raise UserError(
            f'--text_encoder={encoder}: there is no such encoder; give tfidf, a folder with '
            'config.json, model.safetensors and tokenizer.json, or an .npy file'
        )


def standardize(text_VE: np.ndarray, encoder: str) -> np.ndarray:
    """Centres the text vectors of a catalogue and scales each to length sqrt(E).

    Args:
      text_VE: float32 [V + 1, E]; a row of zeros means no text. Row 0 is for padding and set to
        zeros.
      encoder: the name of the encoder in messages.

    Returns:
      float32 [V + 1, E]; zeros where there is no text or the vector equals the mean.

    Raises:
      UserError: when fewer than two vectors differ from the mean.
    """
    text_VE = text_VE.copy()
    text_VE[0] = 0
    has_text_V1 = text_VE.any(axis=1, keepdims=True)
    mean_1E = text_VE.sum(axis=0, keepdims=True) / max(has_text_V1.sum(), 1)
    centred_VE = (text_VE - mean_1E) * has_text_V1
    length_V1 = np.linalg.norm(centred_VE, axis=1, keepdims=True)
    # A vector that equals the mean leaves rounding errors, whose direction means nothing.
    differs_V1 = length_V1 > 1e-5 * np.linalg.norm(text_VE, axis=1, keepdims=True)
    if differs_V1.sum() < 2:
        raise UserError(
            f'--text_encoder={encoder}: the vectors of all {has_text_V1.sum():,} items with a text '
            'are equal or zero; name other --text_fields or another encoder'
        )
    scaled_VE = centred_VE * differs_V1 / np.maximum(length_V1, 1e-12)
    return (scaled_VE * text_VE.shape[1] ** 0.5).astype(np.float32)


def read_vectors(path: Path, count: int) -> np.ndarray:
    """Reads vectors from an .npy file, float32 [count, E].

    Raises:
      UserError: when the file is missing or damaged, has another number of rows than `count`, or
        has values that are not finite.
    """
    with explain_os_errors(f'reading {path}'):
        try:
            table = np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise UserError(
                f'{path}: not an .npy file of numbers, or cut short; save it again'
            ) from error
    if not isinstance(table, np.ndarray) or table.ndim != 2 or table.dtype.kind != 'f':
        kind = f'{table.dtype} {table.shape}' if isinstance(table, np.ndarray) else 'an archive'
        raise UserError(f'{path}: has {kind}; save an array of floats [{count}, width]')
    if len(table) != count or not table.shape[1]:
        raise UserError(
            f'{path}: has shape {table.shape}, and {count} rows are needed: one for padding, then '
            'one for each item in the order of dataset/ids.json'
        )
    with np.errstate(over='ignore'):
        table = table.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(table).all(axis=1))
    if len(bad):
        raise UserError(
            f'{path}: {len(bad)} rows have values that are not finite in float32, the first is row '
            f'{bad[0]} (counted from 0); correct them'
        )
    return table


def _encode_with_model(
    texts: Sequence[str], folder: Path, cache: Path, progress: bool, log: Log
) -> np.ndarray:
    settings = sentence_encoder.read_settings(folder)
    path = cache / f'text-{sentence_encoder.digest(settings)[:32]}.npz'
    width = settings.module.width
    cached = _read_cache(path, width, log)
    keys = {text: hashlib.sha256(text.encode()).hexdigest() for text in texts if text.strip()}
    new = [text for text, key in keys.items() if key not in cached]
    if new:
        model = sentence_encoder.load(settings)
        log(f'text: encoding {len(new):,} of {len(keys):,} different texts')
        try:
            for rows, vector_BE in sentence_encoder.embed_batches(model, new, progress):
                cached |= {keys[new[row]]: vector for row, vector in zip(rows, vector_BE)}
        finally:
            # After Ctrl-C, the next call encodes the remaining texts only.
            _write_cache(path, cached, width)
    blank = np.zeros(width, np.float32)
    rows = [cached[keys[text]] if text in keys else blank for text in texts]
    return np.stack(rows) if rows else np.zeros((0, width), np.float32)


def _read_cache(path: Path, width: int, log: Log) -> dict[str, np.ndarray]:
    """SHA-256 of a text, in hexadecimal -> its vector; empty where the file is damaged."""
    if not path.exists():
        return {}
    try:
        with np.load(path, allow_pickle=False) as file:
            keys, vectors = file['keys'], file['vectors']
        if vectors.shape != (len(keys), width) or not np.isfinite(vectors).all():
            raise ValueError('wrong shape or values that are not finite')
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        log(f'text: {path} is damaged ({error}); its texts are encoded again')
        return {}
    return dict(zip(keys.tolist(), vectors))


def _write_cache(path: Path, cached: dict[str, np.ndarray], width: int) -> None:
    with explain_os_errors(f'writing {path}'):
        path.parent.mkdir(parents=True, exist_ok=True)
    vectors = np.array(list(cached.values()), np.float32).reshape(len(cached), width)
    with atomic_write(path) as file:
        np.savez(file, keys=np.array(list(cached), 'U64'), vectors=vectors)

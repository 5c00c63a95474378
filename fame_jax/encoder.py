"""Texts as vectors: by hashed TF-IDF, by a BERT from a folder, or read from a file.

A model is a folder as sentence-transformers saves it: config.json, model.safetensors and
tokenizer.json, and where they are there modules.json, sentence_bert_config.json, 1_Pooling. Its
vectors are those of sentence-transformers to 1e-5, without torch. They are kept on disk by model
and text, so that only new texts are encoded.
"""

import contextlib
import functools
import hashlib
import importlib
import json
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from fame_jax.data import tfidf
from fame_jax.errors import UserError, explain_os_errors
from fame_jax.models import bert
from fame_jax.records import replacing

# A text is padded to the next of these: few programs to compile, little padding.
LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384)
# Tokens in a batch, padding among them: what a core's cache holds well.
BATCH_TOKENS = 2048
# Stands in the name of the cache; to be raised when the same model and text give other vectors.
CACHE_FORMAT = 1

Say = Callable[[str], None]


class Settings(NamedTuple):
    """What a model's folder says of it, its weights and vocabulary aside.

    Fields:
      folder: where weights and tokenizer lie.
      module: the encoder, without parameters.
      max_length: tokens of a text that are read, [CLS] and [SEP] among them.
      lower: whether texts are lower-cased before the tokenizer sees them.
      normalize: whether vectors have unit length.
    """

    folder: Path
    module: bert.Bert
    max_length: int
    lower: bool
    normalize: bool


class TextModel(NamedTuple):
    """A model that is ready to embed: settings, parameters, and a tokenizers.Tokenizer."""

    settings: Settings
    params: dict[str, Any]
    tokenizer: Any


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
    settings = read_settings(folder)
    path = cache / f'text-{digest(settings)[:32]}.npz'
    width = settings.module.width
    known = _read_cache(path, width, say)
    keys = {text: hashlib.sha256(text.encode()).hexdigest() for text in texts if text.strip()}
    new = [text for text, key in keys.items() if key not in known]
    if new:
        model = load(settings)
        say(f'text: encoding {len(new):,} of {len(keys):,} different texts')
        try:
            for rows, vector_BD in _embed_batches(model, new, progress):
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


def read_settings(folder: Path) -> Settings:
    """Reads what the folder says of the model, and refuses what would give other vectors.

    Raises:
      UserError: when a file is missing or damaged, the architecture is not BERT, or the pooling
        is not the mean.
    """
    modules = folder / 'modules.json'
    # Without modules, sentence-transformers takes the mean and leaves lengths as they are.
    parts = _read_modules(modules) if modules.exists() else {'Transformer': ''}
    if 'Pooling' in parts:
        _check_pooling(folder / parts['Pooling'] / 'config.json')
    _check_prompt(folder / 'config_sentence_transformers.json')
    folder /= parts['Transformer']
    module = bert.from_settings(_read_json(folder / 'config.json'), str(folder / 'config.json'))
    extra = _read_json(folder / 'sentence_bert_config.json', optional=True)
    length = extra.get('max_seq_length')
    if length is None:
        length = _read_json(folder / 'tokenizer_config.json', optional=True).get('model_max_length')
    max_length = module.max_positions if length is None else min(length, module.max_positions)
    lower = bool(extra.get('do_lower_case', False))
    return Settings(folder, module, int(max_length), lower, 'Normalize' in parts)


def _read_modules(path: Path) -> dict[str, str]:
    """Kind of a module -> its folder; only an encoder, a pooling and a scaling are understood."""
    modules = _read_json(path, kind=list)
    try:
        parts = {module['type'].rpartition('.')[2]: module['path'] for module in modules}
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f'{path}: modules without type and path; download it again') from error
    if list(parts) not in (
        ['Transformer', 'Pooling'],
        ['Transformer', 'Pooling', 'Normalize'],
    ):
        raise UserError(
            f'{path}: the modules are {", ".join(parts)}; only Transformer, Pooling and then, or '
            'not, Normalize can be read'
        )
    return parts


def _check_pooling(path: Path) -> None:
    pooling = _read_json(path)
    old = [name for name, on in pooling.items() if name.startswith('pooling_mode_') and on]
    modes = pooling.get('pooling_mode', old)
    if modes not in ('mean', ['mean'], ['pooling_mode_mean_tokens']):
        raise UserError(f'{path}: pools by {modes}, and only the mean over tokens can be had')


def _check_prompt(path: Path) -> None:
    prompt = _read_json(path, optional=True).get('default_prompt_name')
    if prompt is not None:
        raise UserError(f'{path}: puts the prompt {prompt!r} before each text; set it to null')


def _read_json(path: Path, *, optional: bool = False, kind: type = dict) -> Any:
    if optional and not path.exists():
        return kind()
    with explain_os_errors(f'reading {path}'):
        text = path.read_bytes()
    value = None
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(text)
    if not isinstance(value, kind):
        what = 'object' if kind is dict else 'array'
        raise UserError(f'{path}: not a JSON {what}, cut short or damaged; copy it again')
    return value


def digest(settings: Settings) -> str:
    """SHA-256 of all that a text's vector depends on, in hexadecimal."""
    summed = hashlib.sha256(repr((CACHE_FORMAT, *settings[1:])).encode())
    for name in ('tokenizer.json', 'model.safetensors'):
        path = settings.folder / name
        with explain_os_errors(f'reading {path}'), path.open('rb') as file:
            summed.update(hashlib.file_digest(file, 'sha256').digest())
    return summed.hexdigest()


def load(settings: Settings) -> TextModel:
    """Reads tokenizer and weights.

    Raises:
      UserError: when they are damaged, do not fit config.json, or the libraries are not there.
    """
    tokenizer = _load_tokenizer(settings)
    safetensors = _extra('safetensors')
    path = settings.folder / 'model.safetensors'
    with explain_os_errors(f'reading {path}'):
        try:
            # In jax's arrays, for numpy alone has no bfloat16.
            with safetensors.safe_open(path, framework='flax') as file:
                tensors = {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
        except safetensors.SafetensorError as error:
            what = 'not a safetensors file, cut short or damaged; copy or download it again'
            raise UserError(f'{path}: {what} ({error})') from error
    return TextModel(settings, bert.parameters(tensors, settings.module, str(path)), tokenizer)


def _load_tokenizer(settings: Settings) -> Any:
    tokenizers, path = _extra('tokenizers'), settings.folder / 'tokenizer.json'
    _read_json(path)
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # The library raises nothing narrower.
        what = ' '.join(str(error).split())
        raise UserError(f'{path}: not a tokenizer: {what}; copy or download it again') from error
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= settings.module.vocabulary:
        raise UserError(
            f'{path}: has {largest + 1} tokens, and config.json a vocab_size of '
            f'{settings.module.vocabulary}; they are of two models'
        )
    tokenizer.enable_truncation(settings.max_length)
    tokenizer.no_padding()
    if settings.lower:
        steps = [tokenizers.normalizers.Lowercase(), tokenizer.normalizer]
        tokenizer.normalizer = tokenizers.normalizers.Sequence([s for s in steps if s is not None])
    return tokenizer


def _extra(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f'a text model needs {name}: pip install -r requirements-text.txt'
        ) from error


def embed(model: TextModel, texts: Sequence[str], *, progress: bool = False) -> np.ndarray:
    """The model's vectors, those of sentence-transformers to 1e-5; '' is a text as any other.

    Returns:
      float32 [len(texts), D_t].
    """
    vectors = np.zeros((len(texts), model.settings.module.width), np.float32)
    for rows, vector_BD in _embed_batches(model, texts, progress):
        vectors[rows] = vector_BD
    return vectors


def _embed_batches(
    model: TextModel, texts: Sequence[str], progress: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields indices of texts and their vectors, the longest texts first."""
    encoded = model.tokenizer.encode_batch_fast(list(texts))
    tokens = [np.array(one.ids, np.int32) for one in encoded]
    module, normalize = model.settings.module, model.settings.normalize
    with tqdm(
        total=len(texts), desc='text', unit='text', disable=not progress, file=sys.stderr
    ) as bar:
        for rows, height, length in batches([len(t) for t in tokens], model.settings.max_length):
            tokens_BL = np.zeros((height, length), np.int32)
            length_B = np.zeros(height, np.int32)
            for b, row in enumerate(rows):
                tokens_BL[b, : len(tokens[row])] = tokens[row]
                length_B[b] = len(tokens[row])
            vector_BD = _embed_tokens(module, normalize, model.params, tokens_BL, length_B)
            yield rows, np.asarray(vector_BD)[: len(rows)]
            bar.update(len(rows))


def batches(lengths: Sequence[int], longest: int) -> Iterator[tuple[np.ndarray, int, int]]:
    """Texts of about one length together, the longest first.

    Args:
      lengths: tokens of each text.
      longest: the most that there can be.

    Yields:
      rows: indices of texts; each text is in one batch.
      height: B of the batch, the same for all batches of one length; the last may need padding.
      length: L of the batch.
    """
    buckets = np.array([*(n for n in LENGTHS if n < longest), longest])
    bucket_of = np.searchsorted(buckets, np.asarray(lengths, int))
    for bucket in reversed(range(len(buckets))):
        rows = np.flatnonzero(bucket_of == bucket)
        length = int(buckets[bucket])
        height = min(len(rows), max(1, BATCH_TOKENS // length))
        for start in range(0, len(rows), max(1, height)):
            yield rows[start : start + height], height, length


@functools.partial(jax.jit, static_argnums=(0, 1))
def _embed_tokens(
    module: bert.Bert, normalize: bool, params: Any, tokens_BL: jax.Array, length_B: jax.Array
) -> jax.Array:
    mask_BL = jnp.arange(tokens_BL.shape[1])[None] < length_B[:, None]
    # Accelerators multiply float32 with fewer digits unless they are told.
    with jax.default_matmul_precision('highest'):
        hidden_BLD = module.apply({'params': params}, tokens_BL, mask_BL)
        return bert.pool(hidden_BLD, mask_BL, normalize)


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

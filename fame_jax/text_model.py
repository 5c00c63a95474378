"""A sentence encoder from a folder, as sentence-transformers saves it, without torch.

The folder holds config.json, model.safetensors and tokenizer.json, and where they are there
modules.json, sentence_bert_config.json and 1_Pooling. The vectors are those of
sentence-transformers to 1e-5.
"""

import contextlib
import functools
import hashlib
import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from fame_jax.errors import UserError, explain_os_errors
from fame_jax.models import bert

# A text is padded to the next of these: few programs to compile, little padding.
LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384)
# Tokens in a batch, padding among them: what a core's cache holds well.
BATCH_TOKENS = 2048
# Stands in the name of the cache; to be raised when the same model and text give other vectors.
CACHE_FORMAT = 1


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
    for rows, vector_BD in embed_batches(model, texts, progress):
        vectors[rows] = vector_BD
    return vectors


def embed_batches(
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

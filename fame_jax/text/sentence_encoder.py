"""Sentence encoders from folders that sentence-transformers has saved, without torch.

A folder has config.json, model.safetensors and tokenizer.json, and optionally modules.json,
sentence_bert_config.json and 1_Pooling. The vectors equal those of sentence-transformers to 1e-5.
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
from fame_jax.text import bert

# Texts are padded to the next of these lengths: few programs to compile, little padding.
LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384)
# Tokens in a batch, including padding; their activations fit the cache of a CPU core.
BATCH_TOKENS = 2048
# Part of the cache's name; increase it when a change here gives other vectors.
CACHE_FORMAT = 1


class Settings(NamedTuple):
    """The settings in a model's folder, without weights and vocabulary.

    Fields:
      folder: of weights and tokenizer.
      module: the encoder, without parameters.
      max_length: maximum number of tokens of a text, including [CLS] and [SEP]; the rest is cut.
      lower: whether texts are lower-cased before tokenization.
      normalize: whether vectors are scaled to unit length.
    """

    folder: Path
    module: bert.Bert
    max_length: int
    lower: bool
    normalize: bool


class TextModel(NamedTuple):
    """A loaded model: settings, parameters, and a tokenizers.Tokenizer."""

    settings: Settings
    params: dict[str, Any]
    tokenizer: Any


def read_settings(folder: Path) -> Settings:
    """Reads the settings of a model, and refuses those that are not supported.

    Raises:
      UserError: when a file is missing or damaged, the architecture is not BERT, or the pooling
        is not the mean.
    """
    modules = folder / 'modules.json'
    # Without modules.json, sentence-transformers takes the mean and does not scale it.
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
    """Class of a module -> its folder; an encoder, a pooling and an optional scaling."""
    modules = _read_json(path, kind=list)
    try:
        parts = {module['type'].rpartition('.')[2]: module['path'] for module in modules}
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f'{path}: a module has no type or path; download it again') from error
    if list(parts) not in (
        ['Transformer', 'Pooling'],
        ['Transformer', 'Pooling', 'Normalize'],
    ):
        raise UserError(
            f'{path}: the modules are {", ".join(parts)}; only Transformer, Pooling and an '
            'optional Normalize are supported; choose another model'
        )
    return parts


def _check_pooling(path: Path) -> None:
    pooling = _read_json(path)
    old = [name for name, on in pooling.items() if name.startswith('pooling_mode_') and on]
    modes = pooling.get('pooling_mode', old)
    if modes not in ('mean', ['mean'], ['pooling_mode_mean_tokens']):
        raise UserError(
            f'{path}: the pooling is {modes}, and only the mean over tokens is supported; choose '
            'another model'
        )


def _check_prompt(path: Path) -> None:
    prompt = _read_json(path, optional=True).get('default_prompt_name')
    if prompt is not None:
        raise UserError(
            f'{path}: the prompt {prompt!r} before each text is not supported; set '
            'default_prompt_name to null'
        )


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
    """SHA-256, in hexadecimal, of everything that a text's vector depends on."""
    hashed = hashlib.sha256(repr((CACHE_FORMAT, *settings[1:])).encode())
    for name in ('tokenizer.json', 'model.safetensors'):
        path = settings.folder / name
        with explain_os_errors(f'reading {path}'), path.open('rb') as file:
            hashed.update(hashlib.file_digest(file, 'sha256').digest())
    return hashed.hexdigest()


def load(settings: Settings) -> TextModel:
    """Reads tokenizer and weights.

    Raises:
      UserError: when they are damaged or do not fit config.json, or when tokenizers or safetensors
        is not installed.
    """
    tokenizer = _load_tokenizer(settings)
    safetensors = _import('safetensors')
    path = settings.folder / 'model.safetensors'
    with explain_os_errors(f'reading {path}'):
        try:
            # As jax arrays, since numpy alone has no bfloat16.
            with safetensors.safe_open(path, framework='flax') as file:
                tensors = {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
        except safetensors.SafetensorError as error:
            what = 'not a safetensors file, cut short or damaged; copy or download it again'
            raise UserError(f'{path}: {what} ({error})') from error
    return TextModel(settings, bert.convert_params(tensors, settings.module, str(path)), tokenizer)


def _load_tokenizer(settings: Settings) -> Any:
    tokenizers, path = _import('tokenizers'), settings.folder / 'tokenizer.json'
    _read_json(path)
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower class
        what = ' '.join(str(error).split())
        raise UserError(f'{path}: not a tokenizer: {what}; copy or download it again') from error
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= settings.module.vocabulary:
        raise UserError(
            f'{path}: has {largest + 1} tokens, and vocab_size in config.json is '
            f'{settings.module.vocabulary}; the two files are of different models, copy both again'
        )
    tokenizer.enable_truncation(settings.max_length)
    tokenizer.no_padding()
    if settings.lower:
        steps = [tokenizers.normalizers.Lowercase(), tokenizer.normalizer]
        tokenizer.normalizer = tokenizers.normalizers.Sequence([s for s in steps if s is not None])
    return tokenizer


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f'a sentence encoder needs {name}; run pip install tokenizers safetensors'
        ) from error


def embed(model: TextModel, texts: Sequence[str], *, progress: bool = False) -> np.ndarray:
    """Encodes texts; '' is encoded like any other text.

    Returns:
      float32 [len(texts), E], those of sentence-transformers to 1e-5.
    """
    vectors = np.zeros((len(texts), model.settings.module.width), np.float32)
    for rows, vector_BE in embed_batches(model, texts, progress):
        vectors[rows] = vector_BE
    return vectors


def embed_batches(
    model: TextModel, texts: Sequence[str], progress: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Encodes texts by batches, the longest texts first.

    Yields:
      Indices of texts, and their vectors, float32 [len(indices), E].
    """
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
            vector_BE = _embed_tokens(module, normalize, model.params, tokens_BL, length_B)
            yield rows, np.asarray(vector_BE)[: len(rows)]
            bar.update(len(rows))


def batches(lengths: Sequence[int], longest: int) -> Iterator[tuple[np.ndarray, int, int]]:
    """Groups texts of similar length into batches, the longest first.

    Args:
      lengths: the number of tokens of each text.
      longest: the maximum number of tokens.

    Yields:
      rows: indices of texts; each text is in exactly one batch.
      height: B, the same for all batches of one length; the last of them may need padding rows.
      length: L, the padded number of tokens.
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
    # By default, accelerators multiply float32 matrices with fewer digits.
    with jax.default_matmul_precision('highest'):
        hidden_BLD = module.apply({'params': params}, tokens_BL, mask_BL)
        return bert.pool(hidden_BLD, mask_BL, normalize)

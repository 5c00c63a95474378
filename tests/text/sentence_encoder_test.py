"""Vectors of sentence encoders against those of sentence-transformers, and refused folders.

`golden/` has the vectors that sentence-transformers gives for the model of `make_text_model`.
Where sentence_transformers is installed, a test compares with it for a published model in the
folder $FAME_JAX_TEXT_MODEL.
"""

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from fixtures import BERT_SETTINGS, TINY_BERT, make_text_model
from hypothesis import given
from hypothesis import strategies as st

from fame_jax.errors import UserError
from fame_jax.text import sentence_encoder, vectors

TEXTS = [
    '',
    'nail polish',
    ' '.join(['toy story of the lego'] * 2000),
    '🎉 lego 🔥',
    '中文 toy',
    'Nail &amp; Polish &quot;',
    'Toy Story (1995).',
    'Éa\u0301 cafe\nlego\ttoy',
]


def write_json(path, value):
    path.write_text(json.dumps(value), encoding='utf-8')


@pytest.fixture(scope='module')
def shared(tmp_path_factory):
    """A model that no test changes."""
    return make_text_model(tmp_path_factory.mktemp('text') / 'tiny')


@pytest.fixture
def folder(tmp_path):
    """A model that the test may change."""
    return make_text_model(tmp_path / 'tiny')


def load(folder):
    return sentence_encoder.load(sentence_encoder.read_settings(folder))


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_vectors_equal_those_of_sentence_transformers(shared):
    actual = sentence_encoder.embed(load(shared), TEXTS)
    with np.load(TINY_BERT) as golden:
        assert_close(actual, golden['vector_BD'])
    assert actual.dtype == np.float32 and np.linalg.norm(actual, axis=1) == pytest.approx(1)


@pytest.mark.skipif('FAME_JAX_TEXT_MODEL' not in os.environ, reason='no $FAME_JAX_TEXT_MODEL')
def test_vectors_of_a_published_model():
    transformers = pytest.importorskip('sentence_transformers')
    folder = os.environ['FAME_JAX_TEXT_MODEL']
    texts = [*TEXTS, 'OPI Nail Lacquer, Simmer and Shimmer, 0.5-Fluid Ounce', 'a' * 5000, '👩‍👩‍👧']
    expected = transformers.SentenceTransformer(folder, device='cpu').encode(texts)
    assert_close(sentence_encoder.embed(load(Path(folder)), texts), expected)


def test_batches_do_not_change_vectors(shared, monkeypatch):
    model = load(shared)
    together = sentence_encoder.embed(model, TEXTS)
    monkeypatch.setattr(sentence_encoder, 'LENGTHS', (2, 4))
    monkeypatch.setattr(sentence_encoder, 'BATCH_TOKENS', 8)
    order = [3, 0, 6, 2, 5, 7, 1, 4]
    assert_close(sentence_encoder.embed(model, [TEXTS[i] for i in order]), together[order])


@given(st.lists(st.integers(0, 300)), st.integers(1, 300))
def test_every_text_is_in_one_batch_that_is_long_enough(lengths, longest):
    lengths = [min(n, longest) for n in lengths]
    seen, shapes = [], set()
    for rows, height, length in sentence_encoder.batches(lengths, longest):
        assert 0 < len(rows) <= height and max(lengths[row] for row in rows) <= length <= longest
        assert height == 1 or height * length <= sentence_encoder.BATCH_TOKENS
        seen += rows.tolist()
        shapes.add((height, length))
    assert sorted(seen) == list(range(len(lengths)))
    assert len({length for _, length in shapes}) == len(shapes) <= len(sentence_encoder.LENGTHS) + 1


def test_without_modules_the_mean_is_not_scaled(folder):
    before = sentence_encoder.embed(load(folder), TEXTS[:2])
    (folder / 'modules.json').unlink()
    mean = sentence_encoder.embed(load(folder), TEXTS[:2])
    lengths = np.linalg.norm(mean, axis=1, keepdims=True)
    assert np.abs(lengths - 1).max() > 0.1
    assert_close(mean / lengths, before)


def test_the_folder_decides_the_maximum_length(folder):
    lengths = [sentence_encoder.read_settings(folder).max_length]
    for value in ({'max_seq_length': 99}, {'max_seq_length': None}):
        write_json(folder / 'sentence_bert_config.json', value)
        lengths.append(sentence_encoder.read_settings(folder).max_length)
    write_json(folder / 'tokenizer_config.json', {'model_max_length': 20})
    lengths.append(sentence_encoder.read_settings(folder).max_length)
    assert lengths == [16, 32, 32, 20]
    assert len(load(folder).tokenizer.encode('toy ' * 50).ids) == 20


def test_the_folder_decides_lower_case(folder):
    tokenizer = json.loads((folder / 'tokenizer.json').read_bytes())
    write_json(folder / 'tokenizer.json', {**tokenizer, 'normalizer': None})
    assert load(folder).tokenizer.encode('TOY').ids == [2, 1, 3]
    write_json(folder / 'sentence_bert_config.json', {'do_lower_case': True})
    assert load(folder).tokenizer.encode('TOY').tokens == ['[CLS]', 'toy', '[SEP]']


def test_the_digest_depends_on_all_that_changes_vectors(folder, tmp_path):
    """But not on the place of the folder."""

    def digest():
        return sentence_encoder.digest(sentence_encoder.read_settings(folder))

    digests = [digest()]
    folder = folder.rename(tmp_path / 'moved')
    assert digest() == digests[0]
    weights, tokenizer = folder / 'model.safetensors', folder / 'tokenizer.json'
    weights.write_bytes(weights.read_bytes()[:-1] + b'\1')
    digests.append(digest())
    text = tokenizer.read_text(encoding='utf-8').replace('"nail"', '"snail"')
    tokenizer.write_text(text, encoding='utf-8')
    digests.append(digest())
    write_json(folder / 'sentence_bert_config.json', {'max_seq_length': 4})
    digests.append(digest())
    modules = json.loads((folder / 'modules.json').read_bytes())
    write_json(folder / 'modules.json', modules[:2])
    digests.append(digest())
    assert len(set(digests)) == 5


# Refusals.


def refusal(folder):
    with pytest.raises(UserError) as error:
        vectors.encode(['toy'], str(folder), cache=folder / 'cache')
    message = str(error.value)
    assert '\n' not in message and not (folder / 'cache').exists()
    return message


FILES = ['config.json', 'model.safetensors', 'tokenizer.json', '1_Pooling/config.json']


@pytest.mark.parametrize('name', [*FILES, 'modules.json', 'sentence_bert_config.json'])
def test_a_missing_or_damaged_file_is_named(folder, name):
    path = folder / name
    whole = path.read_bytes()
    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        message = refusal(folder)
        assert message.startswith(str(path)) and re.search('(copy|download) it again', message)
    if name in FILES:
        path.unlink()
        assert f'reading {path}: No such file' in refusal(folder)


DENSE = [{'type': f'models.{n}', 'path': ''} for n in ('Transformer', 'Pooling', 'Dense')]
CHANGES = {
    'architecture': ('config.json', {**BERT_SETTINGS, 'model_type': 'mpnet'}, 'mpnet'),
    'layers': ('config.json', {**BERT_SETTINGS, 'num_hidden_layers': 3}, 'encoder.layer.2.'),
    'vocabulary': ('config.json', {**BERT_SETTINGS, 'vocab_size': 20}, 'are of different models'),
    'no tokenizer': ('tokenizer.json', {'version': '1.0'}, 'not a tokenizer'),
    'pooling': ('1_Pooling/config.json', {'pooling_mode_cls_token': True}, 'cls_token'),
    'two poolings': ('1_Pooling/config.json', {'pooling_mode': ['mean', 'max']}, 'max'),
    'prompt': ('config_sentence_transformers.json', {'default_prompt_name': 'query'}, 'query'),
    'modules': ('modules.json', [{'type': 'a.Transformer', 'path': ''}], 'Pooling'),
    'a dense layer': ('modules.json', DENSE, 'Transformer, Pooling, Dense'),
    'no modules': ('modules.json', [3], 'no type or path'),
    'an array': ('config.json', [], 'not a JSON object'),
}


@pytest.mark.parametrize('change', CHANGES)
def test_unsupported_settings_are_refused(folder, change):
    name, value, words = CHANGES[change]
    write_json(folder / name, value)
    assert words in refusal(folder)


@pytest.mark.parametrize('name', ['tokenizers', 'safetensors'])
def test_missing_libraries_are_named(shared, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f'needs {name}; run pip install tokenizers safetensors'):
        vectors.encode(['toy'], str(shared), cache=tmp_path)

"""Vectors of texts against sentence-transformers' own, the cache, and what is refused.

A model is built in a folder from seeded numbers and a tokenizer of 60 tokens; what torch and
sentence-transformers gave for it lies in `golden/`. Where sentence_transformers is installed it is
asked again, and so for the model in the folder $FAME_JAX_TEXT_MODEL.
"""

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from bert_test import GOLDEN, SETTINGS, tiny_tensors
from hypothesis import given
from hypothesis import strategies as st

from fame_jax import encoder, text_model
from fame_jax.data import tfidf
from fame_jax.errors import UserError

MAX_LENGTH = 16
WORDS = [*'nail polish toy story lego the of and amp'.split(), *'&;中文🎉.()']  # noqa: SIM905
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
COPY_AGAIN = 'copy or download it again|copy it again'


def write_json(path, value):
    path.write_text(json.dumps(value), encoding='utf-8')


def build_tokenizer():
    tokenizers = pytest.importorskip('tokenizers')
    special = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]']
    letters = [*'abceilnorstuy', *(f'##{letter}' for letter in 'abceilnorstuy')]
    tokens = [*special, *WORDS, *letters, *'0159']
    assert len(tokens) <= SETTINGS['vocab_size']
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token='[UNK]'))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single='[CLS] $A [SEP]', special_tokens=[('[CLS]', 2), ('[SEP]', 3)]
    )
    # Published tokenizers come with lengths of their own; the model's folder says others.
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    return tokenizer


def build_model(folder, seed=0):
    """A model's folder as sentence-transformers saves it."""
    safetensors = pytest.importorskip('safetensors.numpy')
    (folder / '1_Pooling').mkdir(parents=True)
    build_tokenizer().save(str(folder / 'tokenizer.json'))
    safetensors.save_file(tiny_tensors(seed=seed), str(folder / 'model.safetensors'))
    write_json(folder / 'config.json', SETTINGS)
    names = {'': 'Transformer', '1_Pooling': 'Pooling', '2_Normalize': 'Normalize'}
    modules = [
        {'idx': i, 'name': str(i), 'path': path, 'type': f'sentence_transformers.models.{name}'}
        for i, (path, name) in enumerate(names.items())
    ]
    write_json(folder / 'modules.json', modules)
    write_json(folder / 'sentence_bert_config.json', {'max_seq_length': MAX_LENGTH})
    pooling = {'word_embedding_dimension': 16, 'pooling_mode_mean_tokens': True}
    write_json(folder / '1_Pooling' / 'config.json', pooling)
    special = {f'{name}_token': f'[{name.upper()}]' for name in ('pad', 'unk', 'cls', 'sep')}
    write_json(
        folder / 'tokenizer_config.json', {'tokenizer_class': 'PreTrainedTokenizerFast', **special}
    )
    return folder


@pytest.fixture(scope='module')
def shared(tmp_path_factory):
    """A model that no test changes."""
    return build_model(tmp_path_factory.mktemp('text') / 'tiny')


@pytest.fixture
def folder(tmp_path):
    """A model that the test may change."""
    return build_model(tmp_path / 'tiny')


def load(folder):
    return text_model.load(text_model.read_settings(folder))


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_vectors_are_those_of_sentence_transformers(shared):
    found = text_model.embed(load(shared), TEXTS)
    with np.load(GOLDEN) as golden:
        assert_close(found, golden['vector_BD'])
    assert found.dtype == np.float32 and np.linalg.norm(found, axis=1) == pytest.approx(1)


def test_stored_vectors_are_what_sentence_transformers_gives_today(shared):
    transformers = pytest.importorskip('sentence_transformers')
    found = transformers.SentenceTransformer(str(shared), device='cpu').encode(TEXTS)
    with np.load(GOLDEN) as golden:
        assert_close(golden['vector_BD'], found)


@pytest.mark.skipif('FAME_JAX_TEXT_MODEL' not in os.environ, reason='no $FAME_JAX_TEXT_MODEL')
def test_a_real_models_vectors_are_those_of_sentence_transformers():
    transformers = pytest.importorskip('sentence_transformers')
    folder = os.environ['FAME_JAX_TEXT_MODEL']
    texts = [*TEXTS, 'OPI Nail Lacquer, Simmer and Shimmer, 0.5-Fluid Ounce', 'a' * 5000, '👩‍👩‍👧']
    expected = transformers.SentenceTransformer(folder, device='cpu').encode(texts)
    assert_close(text_model.embed(load(Path(folder)), texts), expected)


def test_batches_do_not_change_vectors(shared, monkeypatch):
    model = load(shared)
    together = text_model.embed(model, TEXTS)
    monkeypatch.setattr(text_model, 'LENGTHS', (2, 4))
    monkeypatch.setattr(text_model, 'BATCH_TOKENS', 8)
    order = [3, 0, 6, 2, 5, 7, 1, 4]
    assert_close(text_model.embed(model, [TEXTS[i] for i in order]), together[order])


@given(st.lists(st.integers(0, 300)), st.integers(1, 300))
def test_every_text_is_in_one_batch_that_holds_it(lengths, longest):
    lengths = [min(n, longest) for n in lengths]
    seen, shapes = [], set()
    for rows, height, length in text_model.batches(lengths, longest):
        assert 0 < len(rows) <= height and max(lengths[row] for row in rows) <= length <= longest
        assert height == 1 or height * length <= text_model.BATCH_TOKENS
        seen += rows.tolist()
        shapes.add((height, length))
    assert sorted(seen) == list(range(len(lengths)))
    assert len({length for _, length in shapes}) == len(shapes) <= len(text_model.LENGTHS) + 1


def test_without_modules_the_mean_is_left_as_long_as_it_is(folder):
    before = text_model.embed(load(folder), TEXTS[:2])
    (folder / 'modules.json').unlink()
    mean = text_model.embed(load(folder), TEXTS[:2])
    lengths = np.linalg.norm(mean, axis=1, keepdims=True)
    assert np.abs(lengths - 1).max() > 0.1
    assert_close(mean / lengths, before)


def test_the_folder_says_how_much_of_a_text_is_read(folder):
    lengths = [text_model.read_settings(folder).max_length]
    for value in ({'max_seq_length': 99}, {'max_seq_length': None}):
        write_json(folder / 'sentence_bert_config.json', value)
        lengths.append(text_model.read_settings(folder).max_length)
    write_json(folder / 'tokenizer_config.json', {'model_max_length': 20})
    lengths.append(text_model.read_settings(folder).max_length)
    assert lengths == [16, 32, 32, 20]
    assert len(load(folder).tokenizer.encode('toy ' * 50).ids) == 20


def test_lower_case_where_the_folder_asks_for_it(folder):
    tokenizer = json.loads((folder / 'tokenizer.json').read_bytes())
    write_json(folder / 'tokenizer.json', {**tokenizer, 'normalizer': None})
    assert load(folder).tokenizer.encode('TOY').ids == [2, 1, 3]
    write_json(folder / 'sentence_bert_config.json', {'do_lower_case': True})
    assert load(folder).tokenizer.encode('TOY').tokens == ['[CLS]', 'toy', '[SEP]']


def test_newer_folders_name_their_pooling(folder):
    write_json(folder / '1_Pooling' / 'config.json', {'pooling_mode': 'mean'})
    assert text_model.read_settings(folder).normalize


# The cache.


@pytest.fixture
def watched(monkeypatch):
    """What was said, and the texts that a model was asked for."""
    said, asked = [], []
    embed_batches = text_model.embed_batches

    def watch(model, texts, progress):
        asked.extend(texts)
        return embed_batches(model, texts, progress)

    monkeypatch.setattr(text_model, 'embed_batches', watch)
    return said, asked


def test_an_item_without_text_has_zeros(shared, tmp_path):
    found = encoder.encode(['', 'toy', ' \n'], str(shared), cache=tmp_path)
    assert_close(found[1], text_model.embed(load(shared), ['toy'])[0])
    assert not found[[0, 2]].any() and found.dtype == np.float32
    assert encoder.encode([], str(shared), cache=tmp_path).shape == (0, 16)


def test_only_new_texts_are_encoded(shared, tmp_path, watched, monkeypatch):
    said, asked = watched
    cache = tmp_path / 'not' / 'there'

    def encode(texts):
        asked.clear()
        return encoder.encode(texts, str(shared), cache=cache, say=said.append)

    first = encode(['toy', 'nail', 'toy', ''])
    assert asked == ['toy', 'nail'] and said == ['text: encoding 2 of 2 different texts']
    assert_close(first[0], first[2])
    second = encode(['lego', 'nail', 'toy'])
    assert asked == ['lego'] and said[1:] == ['text: encoding 1 of 3 different texts']
    np.testing.assert_array_equal(second[[2, 1]], first[:2])
    # And where nothing is new, not even the weights are read.
    monkeypatch.setattr(text_model, 'load', None)
    np.testing.assert_array_equal(encode(['toy', '', 'lego']), [first[0], first[3], second[0]])
    assert asked == [] and len(said) == 2 and len(list(cache.iterdir())) == 1


@pytest.mark.parametrize('change', ['weights', 'tokenizer', 'length', 'normalize'])
def test_another_model_has_a_cache_of_its_own(folder, change):
    before = text_model.digest(text_model.read_settings(folder))
    assert before == text_model.digest(text_model.read_settings(folder))
    if change == 'weights':
        path = folder / 'model.safetensors'
        path.write_bytes(path.read_bytes()[:-1] + b'\1')
    elif change == 'tokenizer':
        path = folder / 'tokenizer.json'
        path.write_text(path.read_text(encoding='utf-8').replace('"nail"', '"snail"'))
    elif change == 'length':
        write_json(folder / 'sentence_bert_config.json', {'max_seq_length': 4})
    else:
        modules = json.loads((folder / 'modules.json').read_bytes())
        write_json(folder / 'modules.json', modules[:2])
    assert text_model.digest(text_model.read_settings(folder)) != before


def test_a_model_may_move(folder, tmp_path):
    before = text_model.digest(text_model.read_settings(folder))
    moved = folder.rename(tmp_path / 'elsewhere')
    assert text_model.digest(text_model.read_settings(moved)) == before


def damages(whole):
    yield 'empty', b''
    yield 'cut short', whole[: len(whole) // 2]
    yield 'no archive', b'#' * len(whole)
    turned = bytearray(whole)
    turned[whole.index(b'vectors.npy') + 200] ^= 1
    yield 'one bit', bytes(turned)


def test_a_damaged_cache_is_told_and_written_again(shared, tmp_path, watched):
    said, asked = watched
    first = encoder.encode(['toy', 'nail'], str(shared), cache=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for name, damaged in damages(whole):
        path.write_bytes(damaged)
        said.clear(), asked.clear()
        again = encoder.encode(['toy', 'nail'], str(shared), cache=tmp_path, say=said.append)
        np.testing.assert_array_equal(again, first)
        assert len(said) == 2 and 'damaged' in said[0] and str(path) in said[0], name
        assert asked == ['toy', 'nail'] and path.read_bytes() == whole


def test_a_cache_of_another_width_is_not_believed(shared, tmp_path):
    said = []
    encoder.encode(['toy'], str(shared), cache=tmp_path)
    (path,) = tmp_path.iterdir()
    with np.load(path) as file:
        np.savez(path, keys=file['keys'], vectors=file['vectors'][:, :3])
    assert encoder.encode(['toy'], str(shared), cache=tmp_path, say=said.append).shape == (1, 16)
    assert 'damaged' in said[0]


def test_what_was_done_before_a_stop_is_kept(shared, tmp_path, watched, monkeypatch):
    _, asked = watched
    texts, calls = ['toy', 'nail polish ' * 9], []
    embed_tokens = text_model._embed_tokens

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return embed_tokens(*arguments)

    monkeypatch.setattr(text_model, '_embed_tokens', stop)
    with pytest.raises(KeyboardInterrupt):
        encoder.encode(texts, str(shared), cache=tmp_path)
    asked.clear()
    encoder.encode(texts, str(shared), cache=tmp_path)
    assert asked == ['toy']  # the longest went first


def test_a_cache_that_cannot_be_written(shared, tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match=r'writing .*/file/'):
        encoder.encode(['toy'], str(shared), cache=tmp_path / 'file')


def test_a_bar_where_it_is_asked_for(shared, tmp_path, capsys):
    encoder.encode(['toy'], str(shared), cache=tmp_path / 'a')
    assert capsys.readouterr().err == ''
    encoder.encode(['toy'], str(shared), cache=tmp_path / 'b', progress=True)
    assert '1/1' in capsys.readouterr().err


# What is refused.


def refusal(folder):
    with pytest.raises(UserError) as error:
        encoder.encode(['toy'], str(folder), cache=folder / 'cache')
    told = str(error.value)
    assert '\n' not in told and not (folder / 'cache').exists()
    return told


FILES = ['config.json', 'model.safetensors', 'tokenizer.json', '1_Pooling/config.json']


@pytest.mark.parametrize('name', FILES)
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    assert f'reading {folder / name}: No such file' in refusal(folder)


@pytest.mark.parametrize('name', [*FILES, 'modules.json', 'sentence_bert_config.json'])
def test_a_file_cut_short_is_named(folder, name):
    path = folder / name
    whole = path.read_bytes()
    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        told = refusal(folder)
        assert told.startswith(str(path)) and re.search(COPY_AGAIN, told)


def test_a_damaged_safetensors_is_named(folder):
    path = folder / 'model.safetensors'
    whole = path.read_bytes()
    for damaged in (b'\xff' * len(whole), whole[:8] + b'?' * (len(whole) - 8), whole + b'more'):
        path.write_bytes(damaged)
        assert re.match(f'{path}: not a safetensors file', refusal(folder))


def test_a_json_that_is_no_tokenizer(folder):
    write_json(folder / 'tokenizer.json', {'version': '1.0'})
    assert refusal(folder).startswith(f'{folder / "tokenizer.json"}: not a tokenizer')


CHANGES = {
    'architecture': ('config.json', {**SETTINGS, 'model_type': 'mpnet'}, 'mpnet'),
    'layers': ('config.json', {**SETTINGS, 'num_hidden_layers': 3}, 'missing: encoder.layer.2.'),
    'vocabulary': ('config.json', {**SETTINGS, 'vocab_size': 20}, 'they are of two models'),
    'pooling': ('1_Pooling/config.json', {'pooling_mode_cls_token': True}, 'cls_token'),
    'two poolings': ('1_Pooling/config.json', {'pooling_mode': ['mean', 'max']}, 'max'),
    'prompt': ('config_sentence_transformers.json', {'default_prompt_name': 'query'}, 'query'),
    'modules': ('modules.json', [{'type': 'a.Transformer', 'path': ''}], 'Pooling'),
    'no modules': ('modules.json', [3], 'without type and path'),
    'an array': ('config.json', [], 'not a JSON object'),
}


@pytest.mark.parametrize('change', CHANGES)
def test_what_would_give_other_vectors_is_refused(folder, change):
    name, value, words = CHANGES[change]
    write_json(folder / name, value)
    assert words in refusal(folder)


def test_a_dense_layer_after_the_pooling_is_refused(folder):
    modules = json.loads((folder / 'modules.json').read_bytes())
    modules[2]['type'] = 'sentence_transformers.models.Dense'
    write_json(folder / 'modules.json', modules)
    assert 'Transformer, Pooling, Dense' in refusal(folder)


@pytest.mark.parametrize('name', ['tokenizers', 'safetensors'])
def test_missing_libraries_are_named(shared, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f'{name}: pip install -r requirements-text.txt'):
        encoder.encode(['toy'], str(shared), cache=tmp_path)


def test_no_such_encoder(tmp_path):
    with pytest.raises(UserError, match='no such text encoder; give tfidf, a folder'):
        encoder.encode(['toy'], 'tf-idf', cache=tmp_path)


# The encoders that need no model.


def test_tfidf(tmp_path):
    texts = ['toy story', 'toy', '']
    found = encoder.encode(texts, 'tfidf', cache=tmp_path, width=2)
    np.testing.assert_array_equal(found, tfidf.vectors(texts, 2))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('dtype', [np.float16, np.float32, np.float64])
def test_vectors_from_a_file(tmp_path, dtype):
    path = tmp_path / 'vectors.npy'
    np.save(path, np.array([[1, 0.5], [0, 0], [-2, 4]], dtype))
    found = encoder.encode(['a', '', 'b'], str(path), cache=tmp_path)
    assert found.dtype == np.float32 and found.tolist() == [[1, 0.5], [0, 0], [-2, 4]]


TABLES = {
    'rows': (np.ones((3, 4)), r'shape \(3, 4\), and 2 rows are wanted'),
    'no columns': (np.ones((2, 0)), r'shape \(2, 0\)'),
    'one axis': (np.ones(2), r'holds float64 \(2,\); wanted are floats \[2, width\]'),
    'whole numbers': (np.ones((2, 4), int), 'holds int64'),
    'nan': (np.array([[1, 2], [np.nan, 3]]), '1 rows hold .* the first is row 1'),
    'infinite': (np.array([[np.inf, 2], [1, 3]]), 'the first is row 0'),
    'too large': (np.array([[1, 2], [1, 1e39]]), 'the first is row 1'),
    'objects': (np.array([[None, 2], [1, 3]]), 'not a .npy of numbers'),
}


@pytest.mark.parametrize('name', TABLES)
def test_files_that_hold_other_than_vectors(tmp_path, name):
    table, words = TABLES[name]
    path = tmp_path / 'vectors.npy'
    np.save(path, table, allow_pickle=True)
    with pytest.raises(UserError, match=f'^{path}: .*{words}'):
        encoder.encode(['a', 'b'], str(path), cache=tmp_path)


def test_files_that_are_no_npy(tmp_path):
    path = tmp_path / 'vectors.npy'
    with pytest.raises(UserError, match=r'reading .*No such file'):
        encoder.read_vectors(path, 2)
    np.save(path, np.ones((2, 4)))
    for damaged in (b'', b'text', path.read_bytes()[:20], path.read_bytes()[:-9]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f'^{path}: not a .npy of numbers'):
            encoder.read_vectors(path, 2)
    with path.open('wb') as file:
        np.savez(file, a=np.ones((2, 4)))
    with pytest.raises(UserError, match='holds an archive'):
        encoder.read_vectors(path, 2)

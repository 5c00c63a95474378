"""Text vectors: .npy files, the cache of a sentence encoder, standardisation, and refusals."""

import numpy as np
import pytest
from fixtures import make_text_model

from fame_jax.errors import UserError
from fame_jax.text import sentence_encoder, tfidf, vectors


@pytest.fixture(scope='module')
def shared(tmp_path_factory):
    """A model that no test changes."""
    return make_text_model(tmp_path_factory.mktemp('text') / 'tiny')


@pytest.fixture
def encoded(monkeypatch):
    """The texts that the model encodes."""
    texts, embed_batches = [], sentence_encoder.embed_batches

    def record(model, new, progress):
        texts.extend(new)
        return embed_batches(model, new, progress)

    monkeypatch.setattr(sentence_encoder, 'embed_batches', record)
    return texts


def test_texts_without_characters_give_zeros(shared, tmp_path):
    actual = vectors.encode(['', 'toy', ' \n'], str(shared), cache=tmp_path)
    model = sentence_encoder.load(sentence_encoder.read_settings(shared))
    expected = sentence_encoder.embed(model, ['toy'])[0]
    np.testing.assert_allclose(actual[1], expected, atol=1e-5)
    assert not actual[[0, 2]].any() and actual.dtype == np.float32
    assert vectors.encode([], str(shared), cache=tmp_path).shape == (0, 16)


def test_only_new_texts_are_encoded(shared, tmp_path, encoded, monkeypatch):
    cache, lines = tmp_path / 'not' / 'there', []

    def encode(texts):
        encoded.clear()
        return vectors.encode(texts, str(shared), cache=cache, log=lines.append)

    first = encode(['toy', 'nail', 'toy', ''])
    assert encoded == ['toy', 'nail'] and lines == ['text: encoding 2 of 2 different texts']
    np.testing.assert_array_equal(first[0], first[2])
    second = encode(['lego', 'nail', 'toy'])
    assert encoded == ['lego'] and lines[1:] == ['text: encoding 1 of 3 different texts']
    np.testing.assert_array_equal(second[[2, 1]], first[:2])
    # Where no text is new, the weights are not read.
    monkeypatch.setattr(sentence_encoder, 'load', None)
    np.testing.assert_array_equal(encode(['toy', '', 'lego']), [first[0], first[3], second[0]])
    assert encoded == [] and len(lines) == 2 and len(list(cache.iterdir())) == 1


def damaged_copies(whole):
    yield b''
    yield whole[: len(whole) // 2]
    yield b'#' * len(whole)
    flipped = bytearray(whole)
    flipped[whole.index(b'vectors.npy') + 200] ^= 1
    yield bytes(flipped)


def test_a_damaged_cache_is_reported_and_written_again(shared, tmp_path, encoded):
    first = vectors.encode(['toy', 'nail'], str(shared), cache=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    with np.load(path) as file:
        other = {'keys': file['keys'], 'vectors': file['vectors'][:, :3]}
    np.savez(path, **other)  # of another width
    for damaged in (path.read_bytes(), *damaged_copies(whole)):
        path.write_bytes(damaged)
        encoded.clear()
        lines = []
        again = vectors.encode(['toy', 'nail'], str(shared), cache=tmp_path, log=lines.append)
        np.testing.assert_array_equal(again, first)
        assert len(lines) == 2 and 'damaged' in lines[0] and str(path) in lines[0]
        assert encoded == ['toy', 'nail'] and path.read_bytes() == whole


def test_vectors_from_before_an_interrupt_are_kept(shared, tmp_path, encoded, monkeypatch):
    calls, embed_tokens = [], sentence_encoder._embed_tokens

    def interrupt(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return embed_tokens(*arguments)

    monkeypatch.setattr(sentence_encoder, '_embed_tokens', interrupt)
    texts = ['toy', 'nail polish ' * 9]
    with pytest.raises(KeyboardInterrupt):
        vectors.encode(texts, str(shared), cache=tmp_path)
    encoded.clear()
    vectors.encode(texts, str(shared), cache=tmp_path)
    assert encoded == ['toy']  # the longest text is encoded first


def test_encoders_without_a_model(tmp_path):
    texts = ['toy story', 'toy', '']
    actual = vectors.encode(texts, 'tfidf', cache=tmp_path / 'cache', width=2)
    np.testing.assert_array_equal(actual, tfidf.vectors(texts, 2))
    path = tmp_path / 'vectors.npy'
    for dtype in (np.float16, np.float32, np.float64):
        np.save(path, np.array([[1, 0.5], [0, 0], [-2, 4]], dtype))
        actual = vectors.encode(texts, str(path), cache=tmp_path / 'cache')
        assert actual.dtype == np.float32 and actual.tolist() == [[1, 0.5], [0, 0], [-2, 4]]
    assert not (tmp_path / 'cache').exists()
    with pytest.raises(UserError, match='there is no such encoder; give tfidf, a folder'):
        vectors.encode(texts, 'tf-idf', cache=tmp_path)


TABLES = {
    'rows': (np.ones((3, 4)), r'shape \(3, 4\), and 2 rows are needed'),
    'no columns': (np.ones((2, 0)), r'shape \(2, 0\)'),
    'one axis': (np.ones(2), r'has float64 \(2,\); save an array of floats \[2, width\]'),
    'integers': (np.ones((2, 4), int), 'has int64'),
    'nan': (np.array([[1, 2], [np.nan, 3]]), '1 rows have .* the first is row 1'),
    'infinite': (np.array([[np.inf, 2], [1, 3]]), 'the first is row 0'),
    'too large': (np.array([[1, 2], [1, 1e39]]), 'the first is row 1'),
    'objects': (np.array([[None, 2], [1, 3]]), 'not an .npy file of numbers'),
}


@pytest.mark.parametrize('name', TABLES)
def test_an_npy_with_other_values_is_refused(tmp_path, name):
    table, message = TABLES[name]
    path = tmp_path / 'vectors.npy'
    np.save(path, table, allow_pickle=True)
    with pytest.raises(UserError, match=f'^{path}: .*{message}'):
        vectors.encode(['a', 'b'], str(path), cache=tmp_path)


def test_a_damaged_npy_is_refused(tmp_path):
    path = tmp_path / 'vectors.npy'
    with pytest.raises(UserError, match=r'reading .*No such file'):
        vectors.read_vectors(path, 2)
    np.save(path, np.ones((2, 4)))
    for damaged in (b'', b'text', path.read_bytes()[:20], path.read_bytes()[:-9]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f'^{path}: not an .npy file of numbers'):
            vectors.read_vectors(path, 2)
    with path.open('wb') as file:
        np.savez(file, a=np.ones((2, 4)))
    with pytest.raises(UserError, match='has an archive'):
        vectors.read_vectors(path, 2)


def test_standardised_vectors_are_centred_and_of_equal_length():
    rng = np.random.default_rng(0)
    text_VE = (rng.normal(size=(9, 5)) + 3).astype(np.float32)
    text_VE[4] = 0  # no text
    before = text_VE.copy()
    actual = vectors.standardize(text_VE, 'tfidf')
    np.testing.assert_array_equal(text_VE, before)
    rows = [1, 2, 3, 5, 6, 7, 8]
    centred = text_VE[rows] - text_VE[rows].mean(axis=0)
    expected = centred / np.linalg.norm(centred, axis=1, keepdims=True) * 5**0.5
    np.testing.assert_allclose(actual[rows], expected, rtol=1e-4, atol=1e-5)
    assert not actual[[0, 4]].any() and actual.dtype == np.float32


@pytest.mark.parametrize('value', [0.0, 1.0])
def test_equal_vectors_are_refused(value):
    with pytest.raises(UserError, match=r'--text_encoder=mine\.npy: .* are equal'):
        vectors.standardize(np.full((4, 5), value, np.float32), 'mine.npy')

"""TF-IDF against an explicit loop, its SVD against numpy's, and repeatability."""

import math
import os
import subprocess
import sys
import zlib

import numpy as np
import pytest
import scipy.sparse

from fame_jax.text import tfidf

TEXTS = [
    'OPI Nail Lacquer red',
    'Nail lacquer, blue',
    'red nail lacquer',
    'Lego train set',
    'LEGO set: train &amp; tracks',
    '',
    '中文玩具',
    '玩具 train',
]


def gram(rows):
    return rows @ rows.T


def test_words_and_pairs():
    assert tfidf.terms('Bath &amp; Body') == ['bath', 'body', 'bath body']
    assert tfidf.terms("5&quot; Café's") == [
        *['5', 'café', 's'],
        *['5 café', 'café s'],
    ]
    assert tfidf.terms('中文 toy') == ['中', '文', 'toy', '中 文', '文 toy']
    assert tfidf.terms('\uff4e\uff41\uff49\uff4c e\u0301') == ['nail', 'é', 'nail é']
    assert tfidf.terms(' 🎉 -- ') == []


def weight_loop(texts):
    """Weight of each term of each text, by the formula."""
    having = {}
    for text in texts:
        for term in set(tfidf.terms(text)):
            having[term] = having.get(term, 0) + 1
    rows = []
    for text in texts:
        row = {}
        for term in tfidf.terms(text):
            count = tfidf.terms(text).count(term)
            idf = 1 + math.log((1 + len(texts)) / (1 + having[term]))
            row[zlib.crc32(term.encode()) % tfidf.BUCKETS] = (1 + math.log(count)) * idf
        rows.append(row)
    return rows


def test_weights_against_an_explicit_loop():
    texts = [*TEXTS, 'nail nail nail lacquer nail lacquer']
    actual = tfidf.weights(texts).todok()
    expected = weight_loop(texts)
    assert actual.shape == (9, tfidf.BUCKETS) and actual.nnz == sum(map(len, expected))
    for i, row in enumerate(expected):
        for bucket, value in row.items():
            assert actual[i, bucket] == pytest.approx(value)


def test_all_columns_keep_every_inner_product():
    """With as many columns as texts, cosines equal those of the weights."""
    rows = tfidf.vectors(TEXTS, 10)
    assert rows.shape == (8, 10) and rows.dtype == np.float32
    weight = tfidf.weights(TEXTS).toarray()
    lengths = np.linalg.norm(weight, axis=1)
    expected = gram(weight / np.where(lengths, lengths, 1)[:, None])
    np.testing.assert_allclose(gram(rows), expected, atol=1e-5)
    assert not rows[:, 7:].any()  # seven texts have words: the rank is seven
    assert not rows[5].any()
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), [1, 1, 1, 1, 1, 0, 1, 1], atol=1e-6)


def test_truncated_svd_is_numpys():
    rng = np.random.default_rng(1)
    matrix = rng.normal(size=(60, 80)) * (rng.random((60, 80)) < 0.2)
    matrix *= np.exp(-np.arange(80) / 8)
    actual = tfidf.principal(scipy.sparse.csr_array(matrix), 5)
    left, values, _ = np.linalg.svd(matrix)
    expected = left[:, :5] * values[:5]
    expected *= np.sign(expected[np.abs(expected).argmax(axis=0), np.arange(5)])
    np.testing.assert_allclose(actual, expected, atol=1e-6 * values[0])


def test_a_small_rank_gives_few_columns():
    matrix = np.outer([1.0, 2, 3], [1, 0, 1, 1])
    assert tfidf.principal(scipy.sparse.csr_array(matrix), 3).shape == (3, 1)
    rows = tfidf.vectors(['same words'] * 4, 3)
    np.testing.assert_allclose(rows, [[1, 0, 0]] * 4, atol=1e-6)


@pytest.mark.parametrize('texts', [[], [''], ['', ' ', '🎉']])
def test_no_words_give_zeros(texts):
    rows = tfidf.vectors(texts, 4)
    assert rows.shape == (len(texts), 4) and not rows.any()


def test_texts_without_a_common_word_repeat():
    """All singular values are equal here, and ARPACK's result differs from call to call."""
    texts = [f'a{i} b{i} c{i}' for i in range(30)] * 2
    rows = tfidf.vectors(texts, 8)
    np.testing.assert_array_equal(tfidf.vectors(texts, 8), rows)
    np.testing.assert_allclose(rows[:30], rows[30:], atol=1e-5)


def test_another_process_gives_the_same_bits():
    """Python's own hash of a text differs between processes."""
    code = f'from fame_jax.text import tfidf\nprint(tfidf.vectors({TEXTS!r}, 3).tobytes().hex())'
    environment = {**os.environ, 'PYTHONHASHSEED': '7', 'PYTHONIOENCODING': 'utf-8'}
    command = [sys.executable, '-X', 'utf8', '-c', code]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert output.stdout.strip() == tfidf.vectors(TEXTS, 3).tobytes().hex()

"""Vectors of texts without a model: TF-IDF of words and pairs of words, then truncated SVD."""

import html
import itertools
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
import scipy.sparse

# Terms are told apart by a hash, so that there is no dictionary to keep.
BUCKETS = 1 << 18

# Japanese and Chinese put no spaces between words; there a character stands for a word.
_LONE = '\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff'
_WORD = re.compile(f'[{_LONE}]|[^\\W_{_LONE}]+')

# Columns and rounds beyond what is asked for, so that the last columns are right too.
_SPARE, _ROUNDS = 16, 6
# Columns whose singular value is so much smaller than the first are rounding and nothing else.
_NOISE = 1e-6


def vectors(texts: Sequence[str], width: int) -> np.ndarray:
    """Texts as vectors whose inner products say how many rare words two texts share.

    Words are lower-cased, HTML's entities undone (`&amp;`), and counted as 1 + ln(count); a term
    weighs 1 + ln((1 + texts) / (1 + texts that have it)). The same texts give the same vectors in
    every process on one machine.

    Args:
      texts: one a row; a text without a word gives a row of zeros.
      width: columns; those beyond the rank of the texts are zeros.

    Returns:
      float32 [len(texts), width]; rows have unit length or are zeros.
    """
    result = np.zeros((len(texts), width), np.float32)
    weight = _unit(weights(texts))
    if weight.nnz:
        columns = principal(weight, width)
        result[:, : columns.shape[1]] = _unit_rows(columns)
    return result


def terms(text: str) -> list[str]:
    """The words of a text in order, then its pairs of neighbours.

    >>> terms('Bath &amp; Body')
    ['bath', 'body', 'bath body']
    """
    plain = unicodedata.normalize('NFKC', html.unescape(text)).lower()
    words = _WORD.findall(plain)
    return words + [f'{a} {b}' for a, b in itertools.pairwise(words)]


def weights(texts: Sequence[str]) -> scipy.sparse.csr_array:
    """Sublinear TF times smoothed IDF, float64 [texts, BUCKETS]."""
    counts = [Counter(zlib.crc32(term.encode()) % BUCKETS for term in terms(t)) for t in texts]
    starts = np.cumsum([0, *map(len, counts)])
    buckets = np.array([bucket for count in counts for bucket in sorted(count)], np.int64)
    times = np.array([count[bucket] for count in counts for bucket in sorted(count)], float)
    having = np.bincount(buckets, minlength=BUCKETS)
    idf = 1 + np.log((1 + len(texts)) / (1 + having))
    values = (1 + np.log(times)) * idf[buckets]
    return scipy.sparse.csr_array((values, buckets, starts), shape=(len(texts), BUCKETS))


def principal(matrix: scipy.sparse.csr_array, width: int) -> np.ndarray:
    """U S of the truncated SVD, the largest first; the largest entry of a column is positive.

    By subspace iteration from seeded vectors (Halko et al., SIAM Review 2011, arXiv 0909.4061).
    ARPACK, which scipy's svds takes by default, restarts from unseeded vectors where texts fall
    into parts without a common word, and then differs from call to call whatever v0 it is given.

    Returns:
      float64 [rows, at most width]; fewer columns where the matrix has a smaller rank.
    """
    matrix = matrix[:, np.unique(matrix.indices)]
    rank = min(*matrix.shape, width + _SPARE)
    start = np.random.default_rng(0).standard_normal((matrix.shape[0], rank))
    basis, _ = np.linalg.qr(start)
    for _ in range(_ROUNDS):
        basis, _ = np.linalg.qr(matrix @ (matrix.T @ basis))
    right = np.asarray(matrix.T @ basis)
    # The Gram matrix is as wide as the basis, and `right` has as many rows as there are terms.
    squares, rotation = np.linalg.eigh(right.T @ right)
    squares, rotation = squares[::-1][:width], rotation[:, ::-1][:, :width]
    kept = squares > squares[0] * _NOISE**2
    left = basis @ rotation[:, kept]
    signs = np.sign(left[np.abs(left).argmax(axis=0), np.arange(left.shape[1])])
    return left * (signs * np.sqrt(squares[kept]))


def _unit(matrix: scipy.sparse.csr_array) -> scipy.sparse.csr_array:
    lengths = np.sqrt(matrix.multiply(matrix).sum(axis=1))
    scale = np.divide(1, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    return scipy.sparse.csr_array(scipy.sparse.diags_array(scale) @ matrix)


def _unit_rows(rows: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > _NOISE)

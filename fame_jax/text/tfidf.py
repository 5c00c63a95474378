"""Text vectors without a model: TF-IDF of words and pairs of words, then truncated SVD."""

import html
import itertools
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
import scipy.sparse

# A term is represented by its hash, so that no dictionary is needed.
BUCKETS = 1 << 18

# Japanese and Chinese have no spaces between words; there each character counts as a word.
_CHARACTER = '\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff'
_WORD = re.compile(f'[{_CHARACTER}]|[^\\W_{_CHARACTER}]+')

# Additional columns, and rounds of iteration, which make the last columns accurate too.
_SPARE, _ROUNDS = 16, 6
# A column whose singular value, relative to the largest, is smaller has rounding errors only.
_NOISE = 1e-6


def vectors(texts: Sequence[str], width: int) -> np.ndarray:
    """Encodes texts as vectors whose inner product is larger the more rare words two texts share.

    Words are lower-cased, with HTML entities (`&amp;`) decoded. A term's weight in a text is
    1 + ln(count), times 1 + ln((1 + texts) / (1 + texts with the term)). The same texts give the
    same vectors in every process on one machine.

    Args:
      texts: one for each row; a text without a word gives zeros.
      width: number of columns; those beyond the rank of the texts are zeros.

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
    """The words of a text in order, then its pairs of adjacent words.

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
    """U S of the truncated SVD, by descending singular value.

    The sign of a column makes its largest entry positive. The method is subspace iteration from
    seeded vectors (Halko et al., SIAM Review 2011, arXiv 0909.4061). ARPACK, the default of scipy's
    svds, restarts from unseeded vectors where groups of texts have no word in common, and its
    result then differs from call to call even with a fixed v0.

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
    # `right` has one row for each term; its Gram matrix is only as wide as the basis.
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

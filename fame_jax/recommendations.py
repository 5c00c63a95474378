"""A file of recommendations: JSON lines, or Parquet with a row each."""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fame_jax import records
from fame_jax.errors import UserError, explain_os_errors

# Histories in a part of a Parquet file, before the parts are put together.
PART = 50_000


def writer(path: Path) -> Callable[[Path, Iterable[dict[str, Any]]], None]:
    """What writes a file of that name, (path, answers) -> None, in memory that does not grow.

    Raises:
      UserError: for a name that ends otherwise.
    """
    found = {'.jsonl': write_lines, '.parquet': write_parquet}.get(path.suffix)
    if found is None:
        raise UserError(
            f'--recommendations={path}: its name must end in .jsonl or .parquet; rename it'
        )
    return found


def write_lines(path: Path, answers: Iterable[dict[str, Any]]) -> None:
    """A JSON object a line."""
    encode = json.JSONEncoder(ensure_ascii=False, separators=(',', ':')).encode
    with records.replacing(path) as file:
        for answer in answers:
            file.write(encode(answer).encode() + b'\n')


def write_parquet(path: Path, answers: Iterable[dict[str, Any]]) -> None:
    """A row a recommendation: history, user, rank, item, score; by parts, to bound memory."""
    import polars as pl

    with (
        explain_os_errors(f'writing {path}'),
        tempfile.TemporaryDirectory(prefix=f'.{path.name}-', dir=path.parent) as aside,
    ):
        for first, part in _parts(answers):
            with records.replacing(Path(aside) / f'{first:012d}.parquet') as file:
                _frame(first, part).write_parquet(file)
        whole = Path(aside) / 'whole'
        try:
            pl.scan_parquet(Path(aside) / '*.parquet').sink_parquet(whole, maintain_order=True)
        except pl.exceptions.ComputeError as error:  # so it tells of a full disk
            raise UserError(f'writing {path}: {" ".join(str(error).split())}') from error
        whole.replace(path)


def _parts(answers: Iterable[dict[str, Any]]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """The number of a part's first history, and its answers; at least one part, be it empty."""
    first, part = 0, []
    for answer in answers:
        part.append(answer)
        if len(part) == PART:
            yield first, part
            first, part = first + PART, []
    if part or not first:
        yield first, part


def _frame(first: int, answers: list[dict[str, Any]]) -> Any:
    import polars as pl

    lengths = [len(answer['items']) for answer in answers]
    each = np.repeat(np.arange(len(answers)), lengths)
    users = np.array([answer.get('user', '') for answer in answers], object)
    return pl.DataFrame(
        {
            'history': pl.Series((first + each).astype(np.int64)),
            'user': pl.Series(users[each].tolist(), dtype=pl.String),
            'rank': pl.Series([k + 1 for n in lengths for k in range(n)], dtype=pl.Int32),
            'item': pl.Series([i for a in answers for i in a['items']], dtype=pl.String),
            'score': pl.Series([s for a in answers for s in a['scores']], dtype=pl.Float32),
        }
    )

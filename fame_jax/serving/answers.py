"""Recommendations, and lists of similar items, as files of JSON lines, CSV or Parquet."""

import collections
import contextlib
import itertools
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fame_jax import run_dir
from fame_jax.errors import UserError, explain_os_errors
from fame_jax.serving import frames
from fame_jax.serving.histories import History
from fame_jax.serving.recommender import ItemId, Recommendation, Recommender

# Answers that are in memory at a time while a table is written.
PART = 50_000


class Answer(NamedTuple):
    """The list of one user, whose id is '' if the history had none."""

    user: str
    found: Recommendation


class SimilarItems(NamedTuple):
    """The items similar to one item.

    Fields:
      item: its id.
      title: its title, '' where unknown.
      by: 'all', or the head whose view of the items was compared.
      found: the list.
    """

    item: str
    title: str
    by: str
    found: Recommendation


def answer(
    recommender: Recommender,
    histories: Iterable[History],
    k: int,
    *,
    filter_seen: bool | None = None,
    allow: Iterable[ItemId] | None = None,
    deny: Iterable[ItemId] = (),
) -> Iterator[Answer]:
    """Yields the recommendations in the order of the histories.

    Histories are read a few thousand ahead of the answers, and only the ids of their users are
    kept.

    Args:
      recommender: a trained model.
      histories: each with a user and items.
      k: length of each list.
      filter_seen, allow, deny: as `Recommender.recommend` has them.
    """
    users = collections.deque()

    def items() -> Iterator[list[str]]:
        for history in histories:
            users.append(history.user)
            yield history.items

    for found in recommender.recommend_many(
        items(), k, filter_seen=filter_seen, allow=allow, deny=deny
    ):
        yield Answer(users.popleft(), found)


def similar(recommender: Recommender, items: Sequence[str], k: int) -> Iterator[SimilarItems]:
    """Yields the k items similar to each item, first by all, then by each of FAME's heads.

    Args:
      recommender: a trained model.
      items: ids of the catalogue, as the recommender's answers have them.
      k: length of each list.
    """
    indices, _ = recommender.to_indices(items)
    title_of = {item: recommender.titles[i] for item, i in zip(items, indices.tolist())}
    ways = ['all', *recommender.facets]
    lists = [recommender.similar_items_many(items, k, by) for by in ways]
    for item, *found in zip(items, *lists):
        for by, one in zip(ways, found):
            yield SimilarItems(item, title_of[item], by, one)


def to_dict(answer: Answer | SimilarItems) -> dict[str, Any]:
    """An answer as a dict for JSON; empty fields are left out.

    Of the most popular items it has `counts`, their numbers of actions, in place of `scores`, since
    these are on another scale.
    """
    found = answer.found
    if isinstance(answer, SimilarItems):
        line = {'item': answer.item, 'title': answer.title, 'by': answer.by, 'items': found.items}
        line |= {'titles': found.titles, 'scores': found.scores, 'score_kind': found.score_kind}
        return {name: value for name, value in line.items() if value or name in ('items', 'scores')}
    scores = 'counts' if found.fallback else 'scores'
    line = {'user': answer.user, 'items': found.items, 'titles': found.titles}
    line |= {scores: found.scores, 'unknown': found.unknown, 'fallback': found.fallback}
    if found.fallback:
        line[scores] = [int(count) for count in found.scores]
    else:
        line['score_kind'] = found.score_kind
    return {name: value for name, value in line.items() if value or name in ('items', scores)}


def writer(path: Path) -> Callable[[Path, Iterable[Answer | SimilarItems]], None]:
    """The function (path, answers) -> None that writes the format which the file's name asks for.

    An older file is replaced when the new one is complete.

    Raises:
      UserError: if the name ends in none of .jsonl, .csv and .parquet.
    """
    write = {'.jsonl': write_lines, '.csv': write_csv, '.parquet': write_parquet}.get(path.suffix)
    if write is None:
        line = f'{path}: lists are written to .jsonl, .csv or .parquet; rename it'
        raise UserError(line)
    return write


def write_lines(path: Path, answers: Iterable[Answer | SimilarItems]) -> None:
    """Writes one JSON object per line.

    Raises:
      UserError: if the file cannot be written.
    """
    encode = json.JSONEncoder(ensure_ascii=False, separators=(',', ':')).encode
    with run_dir.atomic_write(path) as file:
        for answer in answers:
            file.write(encode(to_dict(answer)).encode() + b'\n')


def write_csv(path: Path, answers: Iterable[Answer | SimilarItems]) -> None:
    """Writes the table of `write_parquet` with a header; an empty field is null.

    Raises:
      UserError: if the file cannot be written.
    """
    with run_dir.atomic_write(path) as file, _explain_polars(path):
        for first, frame in _frames(answers):
            frame.write_csv(file, include_header=not first)


def write_parquet(path: Path, answers: Iterable[Answer | SimilarItems]) -> None:
    """Writes one row per recommended item.

    Its columns are history, user, rank, item, title, score, score_kind and count. `history` is the
    index of the answer, from 0. `title` is '' where none is known. A row has a score, or the number
    of actions of one of the most popular items, and null for the other. Of similar items the
    columns are item, by, rank, similar, title and score; `title` is that of `similar`.
    Parts of PART answers are written and then joined, so that memory does not grow with their
    number.

    Raises:
      UserError: if the file cannot be written.
    """
    import polars as pl

    with (
        explain_os_errors(f'writing {path}'),
        tempfile.TemporaryDirectory(prefix=f'.{path.name}-', dir=path.parent) as aside,
        _explain_polars(path),
    ):
        for first, frame in _frames(answers):
            with run_dir.atomic_write(Path(aside) / f'{first:012d}.parquet') as file:
                frame.write_parquet(file)
        whole = Path(aside) / 'whole'
        pl.scan_parquet(Path(aside) / '*.parquet').sink_parquet(whole, maintain_order=True)
        whole.replace(path)


def _frames(answers: Iterable[Answer | SimilarItems]) -> Iterator[tuple[int, Any]]:
    """Yields the index of the first answer and the table of each part; one part if all is empty."""
    answers, first = iter(answers), 0
    while (part := list(itertools.islice(answers, PART))) or not first:
        yield first, _frame(first, part)
        first += PART


def _frame(first: int, answers: list[Answer | SimilarItems]) -> Any:
    import polars as pl

    columns = frames.table([answer.found for answer in answers], has_titles=True)
    each = [i for i, answer in enumerate(answers) for _ in answer.found.items]
    if answers and isinstance(answers[0], SimilarItems):
        return pl.DataFrame(
            {
                'item': pl.Series([answers[i].item for i in each], dtype=pl.String),
                'by': pl.Series([answers[i].by for i in each], dtype=pl.String),
                'rank': pl.Series(columns['rank'], dtype=pl.Int32),
                'similar': pl.Series(columns['item'], dtype=pl.String),
                'title': pl.Series(columns['title'], dtype=pl.String),
                'score': pl.Series(columns['score'], dtype=pl.Float32),
            }
        )
    return pl.DataFrame(
        {
            'history': pl.Series([first + i for i in each], dtype=pl.Int64),
            'user': pl.Series([answers[i].user for i in each], dtype=pl.String),
            'rank': pl.Series(columns['rank'], dtype=pl.Int32),
            'item': pl.Series(columns['item'], dtype=pl.String),
            'title': pl.Series(columns['title'], dtype=pl.String),
            'score': pl.Series(columns['score'], dtype=pl.Float32),
            'score_kind': pl.Series(columns['score_kind'], dtype=pl.String),
            'count': pl.Series(columns['count'], dtype=pl.Int64),
        }
    )


@contextlib.contextmanager
def _explain_polars(path: Path) -> Iterator[None]:
    """Turns an error of polars about the file that it writes into a UserError."""
    import polars as pl

    try:
        yield
    except pl.exceptions.PolarsError as error:  # polars reports a full disk in this way
        raise UserError(f'writing {path}: {" ".join(str(error).split())}') from error

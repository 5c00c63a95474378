"""Files of recommendations: scores and counts apart, titles, and no half file."""

import csv
import json

import polars as pl
import pytest
from fixtures import run_python
from run_fixtures import COUNT_V, ITEM_IDS, make_recommender

from fame_jax.errors import UserError
from fame_jax.serving import answers
from fame_jax.serving.answers import Answer
from fame_jax.serving.histories import History
from fame_jax.serving.recommender import POPULARITY, Recommendation

pytestmark = pytest.mark.filterwarnings('ignore::fame_jax.serving.recommender.UnknownItemsWarning')

COLUMNS = {
    **{'history': pl.Int64, 'user': pl.String, 'rank': pl.Int32, 'item': pl.String},
    **{'title': pl.String, 'score': pl.Float32, 'score_kind': pl.String, 'count': pl.Int64},
}
FORMATS = ('o.jsonl', 'o.csv', 'o.parquet')


def some_answers(number):
    """Answers of 0 to 2 items; every third has no user, every fourth the most popular items."""
    for n in range(number):
        items = [f'i{n}-{k}' for k in range(n % 3)]
        scores = [float(n + k) for k in range(len(items))]
        kind = ('', 'dot product') if n % 4 else ('popularity', POPULARITY)
        titles = [f'"title", {n}\n', ''][: len(items)]
        yield Answer(
            '' if n % 3 == 2 else f'ü{n}', Recommendation(items, scores, [], *kind, titles)
        )


def expected_rows(number):
    return [
        (n, user, rank, item, title, *((None, kind, score) if fallback else (score, kind, None)))
        for n, (user, (items, scores, _, fallback, kind, titles)) in enumerate(some_answers(number))
        for rank, (item, title, score) in enumerate(zip(items, titles, scores), 1)
    ]


def test_json_lines_of_a_recommender(tmp_path):
    """The most popular items have counts in place of scores; titles stand where they are known."""
    path, titles = tmp_path / 'o.jsonl', ['', *(f'title of {item}' for item in ITEM_IDS[1:])]
    recommender, *_ = make_recommender(titles=titles)
    given = [History('ann', ['a', 'who']), History('', ['who']), History('bob', [])]
    answers.writer(path)(path, answers.answer(recommender, given, 2))
    ann, stranger, bob = map(json.loads, path.read_text(encoding='utf-8').splitlines())
    found = recommender.recommend(['a'], 2)
    assert ann == {
        **{'user': 'ann', 'items': found.items, 'scores': found.scores, 'unknown': ['who']},
        **{'titles': [f'title of {item}' for item in found.items], 'score_kind': 'dot product'},
    }
    popular = {'items': ['b', '007'], 'counts': [9, 9], 'fallback': 'popularity'}
    popular['titles'] = ['title of b', 'title of 007']
    assert stranger == {**popular, 'unknown': ['who']} and bob == {'user': 'bob', **popular}
    recommender, *_ = make_recommender()
    answers.writer(path)(path, answers.answer(recommender, given, 2))
    assert 'titles' not in path.read_text() and COUNT_V.max() == 9


@pytest.mark.parametrize('number', [0, 1, 7, 14, 50])
def test_a_table_in_parts_is_one_table(tmp_path, monkeypatch, number):
    """As CSV an absent value is an empty field."""
    monkeypatch.setattr(answers, 'PART', 7)
    for name in ('o.csv', 'o.parquet'):
        answers.writer(tmp_path / name)(tmp_path / name, some_answers(number))
    table = pl.read_parquet(tmp_path / 'o.parquet')
    assert dict(table.schema) == COLUMNS and table.rows() == expected_rows(number)
    with open(tmp_path / 'o.csv', newline='', encoding='utf-8') as file:
        header, *lines = csv.reader(file)
    texts = [['' if x is None else str(x) for x in row] for row in expected_rows(number)]
    assert header == list(COLUMNS)
    assert [line[:7] for line in lines] == [row[:7] for row in texts]
    assert [line[7] for line in lines] == [row[7].removesuffix('.0') for row in texts]
    assert {path.name for path in tmp_path.iterdir()} == {'o.csv', 'o.parquet'}


def test_no_column_holds_two_scales():
    """In every form a count of actions and a score of the model stand in different columns."""
    for frame in (answers._frame(0, list(some_answers(50))),):
        kinds = frame.select('score_kind', pl.col('score', 'count').is_not_null()).unique().rows()
        assert sorted(kinds) == [('dot product', True, False), (POPULARITY, False, True)]
    for line in map(answers.to_dict, some_answers(50)):
        assert ('counts' in line) != ('scores' in line)
        assert ('counts' in line) == (line.get('fallback') == 'popularity')


@pytest.mark.parametrize('name', FORMATS)
def test_an_older_file_stays_if_the_answers_fail(tmp_path, name):
    path = tmp_path / name
    path.write_text('precious')

    def failing():
        yield from some_answers(3)
        raise UserError('line 4')

    with pytest.raises(UserError, match='line 4'):
        answers.writer(path)(path, failing())
    assert path.read_text() == 'precious' and len(list(tmp_path.iterdir())) == 1
    missing = tmp_path / 'no' / name
    with pytest.raises(UserError, match='No such file'):
        answers.writer(missing)(missing, some_answers(3))
    with pytest.raises(UserError, match=r'\.jsonl, \.csv or \.parquet'):
        answers.writer(tmp_path / 'o.txt')


def test_a_full_disk_is_one_line_and_leaves_no_half_file(tmp_path):
    """In a process that limits the size of its files, which fails as a full disk does.

    The first byte, a part of a table, and the whole that is joined from parts do not fit in turn.
    """
    code = f"""
        import resource
        from pathlib import Path
        from fame_jax.errors import UserError
        from fame_jax.serving import answers
        from fame_jax.serving.recommender import Recommendation

        answers.PART = 400
        items = [[f'item {{n}} {{k * n}}' for k in range(10)] for n in range(1200)]
        found = [Recommendation(each, [n / 7] * 10, [], '') for n, each in enumerate(items)]
        rows = [answers.Answer(f'user {{n}}', each) for n, each in enumerate(found)]
        for name in {FORMATS}:
            path = Path({str(tmp_path)!r}) / name
            answers.writer(path)(path, rows)
            size = path.stat().st_size
            path.write_text('precious')
            for most in (0, 100, size // 2, size - 1):
                resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
                try:
                    answers.writer(path)(path, rows)
                except UserError as error:
                    line = str(error)
                    assert '\\n' not in line and line.startswith(f'writing {{path}}'), line
                else:
                    raise AssertionError((name, most))
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
                assert path.read_text() == 'precious'
    """
    run_python(code)
    assert {path.name for path in tmp_path.iterdir()} == {*FORMATS}

"""Random logs with hostile fields, written in every form, against a reader in plain Python."""

import ast
import csv
import json

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fame_jax.data.readers import read_log
from fame_jax.errors import UserError

NAMES = ['user', 'item', 'time', 'note']


def read_plainly(path, form):
    """Reads (user, item, time) of every record, with what the writer's form guarantees alone."""
    if form == 'parquet':
        rows = pl.read_parquet(path).rows(named=True)
    elif form in ('jsonl', 'python'):
        parse = json.loads if form == 'jsonl' else ast.literal_eval
        with open(path, encoding='utf-8', newline='\n') as file:
            rows = [parse(line) for line in file.read().split('\n') if line]
    elif form in ('tsv', 'inter'):
        with open(path, encoding='utf-8', newline='\n') as file:
            _, *lines = file.read().removesuffix('\n').split('\n')
        rows = [dict(zip(NAMES, line.split('\t'))) for line in lines]
    else:
        with open(path, encoding='utf-8', newline='') as file:
            _, *records = csv.reader(file, delimiter=form[-1], strict=True)
        rows = [dict(zip(NAMES, record)) for record in records]
    return [(row['user'].strip(), row['item'].strip(), int(row['time'])) for row in rows]


def write(path, form, rows, quoting, crlf):
    if form == 'parquet':
        pl.DataFrame(rows, schema=NAMES, orient='row').write_parquet(path)
        return
    end = '\r\n' if crlf else '\n'
    with open(path, 'w', encoding='utf-8', newline='') as file:
        if form in ('tsv', 'inter'):
            names = [f'{name}:token' for name in NAMES] if form == 'inter' else NAMES
            file.writelines('\t'.join(map(str, row)) + end for row in [names, *rows])
        elif form in ('jsonl', 'python'):
            show = json.dumps if form == 'jsonl' else repr
            file.writelines(show(dict(zip(NAMES, row))) + end for row in rows)
        else:
            writer = csv.writer(file, delimiter=form[-1], quoting=quoting, lineterminator=end)
            writer.writerows([NAMES, *rows])


FORMS = {
    **{'csv,': 'x.csv', 'csv;': 'x.csv', 'csv|': 'x.csv', 'csv\t': 'x.tsv'},
    **{form: f'x.{form}' for form in ('tsv', 'inter', 'jsonl', 'parquet')},
    'python': 'x.json',
}
TEXT = st.text('aBz017"\',;|:\t\n {}[]#\\-.éß東\u2028\u00a0\U0001f600', max_size=6)
# With a letter, since numbers may be written in several ways.
ID = st.builds('{}{}{}'.format, TEXT, st.sampled_from('aBzéß東'), TEXT)
ROWS = st.lists(
    st.tuples(ID, ID, st.integers(1_500_000_000, 1_600_000_000), TEXT), min_size=1, max_size=12
)


def make_writable(text, form):
    """Without quotes, tabs and newlines cannot be written, nor quotes around a whole field."""
    text = text.replace('\t', '_').replace('\n', '_')
    enclosed = form == 'tsv' and text.strip(' ')[:1] == text.strip(' ')[-1:] == '"'
    return f'{text}.' if enclosed else text


def check(path, form, rows, quoting, crlf):
    if form in ('tsv', 'inter'):
        rows = [[make_writable(v, form) if type(v) is str else v for v in row] for row in rows]
    write(path, form, rows, quoting, crlf)
    expected = read_plainly(path, form)
    assert expected == [(user.strip(), item.strip(), time) for user, item, time, _ in rows]
    try:
        log = read_log(path, {'user': 'user', 'item': 'item', 'time': 'time'})
    except UserError as error:
        if 'are lists' in str(error):
            assert any(item.strip()[0] + item.strip()[-1] == '[]' for _, item, *_ in rows)
            return
        # A field over several lines may be refused where its lines look like records.
        assert 'a quote opens here' in str(error) and form.startswith('csv')
        assert any('\n' in text for row in rows for text in (row[0], row[1], row[3]))
        return
    read = zip(log.users, log.items, log.times.tolist())
    assert [(log.user_ids[u], log.item_ids[i], time) for u, i, time in read] == expected


CASES = {
    'rows': ROWS,
    'quoting': st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    'crlf': st.booleans(),
}
SAME_FOLDER = [HealthCheck.function_scoped_fixture]  # each example writes its file anew


@pytest.mark.parametrize('form', FORMS)
@settings(deadline=None, max_examples=40, suppress_health_check=SAME_FOLDER)
@given(**CASES)
def test_every_form_is_read_as_a_plain_reader_does(form, tmp_path, rows, quoting, crlf):
    check(tmp_path / FORMS[form], form, rows, quoting, crlf)


@pytest.mark.fuzz
@pytest.mark.parametrize('form', FORMS)
@settings(deadline=None, max_examples=300, suppress_health_check=SAME_FOLDER)
@given(**CASES)
def test_many_more_logs(form, tmp_path, rows, quoting, crlf):
    check(tmp_path / FORMS[form], form, rows, quoting, crlf)

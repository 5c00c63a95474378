"""Trained runs in use: titles from item files and the faults of those, and repeated items."""

import json
from pathlib import Path

import polars as pl
import pytest
from run_fixtures import SMALL_RUN

from fame_jax.api import load
from fame_jax.main import main


def use(folder, stage, *more):
    return main(['--progress=none', f'--workdir={folder}', f'--stages={stage}', *more])


def lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding='utf-8').splitlines()]


LOG = 'customer,sku,bought_at\n' + ''.join(
    f'u{user},i{(user + 3 * day) % 20},{day}\n' for user in range(40) for day in range(6)
)
COLUMNS = '--columns=user:customer,item:sku,time:bought_at'
TITLES = {f'i{n}': f'Title "{n}"' for n in range(20)}


def orders_flags(folder):
    """Flags of a small model and of the log in a folder, whose columns they name."""
    omitted = ('--synthetic', '--finetune', '--num_experts')
    small = [flag for flag in SMALL_RUN if not flag.startswith(omitted)]
    return [*small, f'--dataset={folder}/orders.csv', COLUMNS, '--k_core=0', '--model=sasrec']


@pytest.fixture(scope='module')
def orders(tmp_path_factory):
    """A trained run of a log whose columns are named by flags; and the log."""
    folder = tmp_path_factory.mktemp('orders')
    (folder / 'orders.csv').write_text(LOG)
    argv = [*orders_flags(folder), '--stages=prepare,pretrain,evaluate', f'--workdir={folder}/run']
    assert main(argv) == 0
    return folder


@pytest.fixture
def items(orders):
    """(name, text) -> an item file next to the log, which is removed after the test."""
    written = []

    def write(text, name='orders_items.csv'):
        written.append(orders / name)
        written[-1].write_text(text)
        return written[-1]

    yield write
    for path in written:
        path.unlink(missing_ok=True)


def titles_of(orders, tmp_path, *flags):
    """Titles by item in recommendations of all users; {} if there are none."""
    out = tmp_path / 'o.jsonl'
    assert use(orders / 'run', 'recommend', f'--out={out}', *flags) == 0
    answers = lines(out)
    assert len({'titles' in answer for answer in answers}) == 1
    return {i: title for a in answers for i, title in zip(a['items'], a.get('titles', ()))}


def item_file(name='sku', title='title', rows=TITLES):
    quoted = (f'{item},"{text.replace(chr(34), 2 * chr(34))}"\n' for item, text in rows.items())
    return f'{name},{title}\n' + ''.join(quoted)


@pytest.mark.parametrize(
    'text',
    [
        item_file(),  # the column of the run
        item_file('item_id'),  # a usual name
        item_file('sku', 'name'),
        'item_id,' + item_file().replace('\ni', '\n7,i'),  # the run's column comes first
        'sku,' + item_file('item_id').replace('\ni', '\n7,i'),  # whose ids are others'
    ],
)
def test_a_file_next_to_the_log_gives_titles(orders, items, tmp_path, text):
    items(text)
    found = titles_of(orders, tmp_path)
    assert len(found) > 5 and found == {item: TITLES[item] for item in found}


@pytest.mark.parametrize(
    'text',
    [
        '',
        'junk',
        'a,b\n1,2\n',
        item_file(rows={'other': 'a title'}),
        item_file(title='colour'),
        item_file() + 'i1,Another\n',
        'sku,title\n,"no id"\n',
    ],
)
def test_such_a_file_stops_no_stage_and_its_fault_is_one_line(
    orders, items, tmp_path, text, capsys
):
    path = items(text)
    assert titles_of(orders, tmp_path) == {}
    for stage in ('explain', 'export'):
        capsys.readouterr()
        out = tmp_path / stage
        args = [f'--workdir={orders}/run', f'--stages={stage}', f'--out={out}', '--progress=lines']
        assert main(args) == 0
        shown = capsys.readouterr()
        said = [line for line in (shown.out + shown.err).splitlines() if 'no titles: ' in line]
        assert len(said) == 1 and path.name in said[0]


def test_a_named_file_gives_titles_and_its_faults_are_refused(orders, items, tmp_path, capsys):
    """--items is accepted for titles alone, at all stages that show them."""
    path = items(item_file('code', 'title'), 'named.csv')
    flags = [f'--items={path}', '--columns=item_file_id:code']
    assert len(titles_of(orders, tmp_path, *flags)) > 5
    out = tmp_path / 'out'
    assert use(orders / 'run', 'explain,export,report', *flags, f'--out={out}') == 0
    assert 'Title ' in (out / 'report.html').read_text()
    assert json.loads((out / 'explanation.json').read_text())['recommended'][0]['title']
    assert 'Title' in (out / 'export' / 'ids.json').read_text()
    for text, words in (
        (item_file('code', 'colour'), 'title'),
        (item_file('sku'), 'code'),
        (item_file('code', rows={'x': 'y'}), "'x'"),
    ):
        items(text, 'named.csv')
        capsys.readouterr()
        assert use(orders / 'run', 'recommend', *flags, f'--out={out}') == 2
        error = capsys.readouterr().err
        assert error.count('\n') == 1 and 'named.csv' in error and words in error


def test_an_output_does_not_replace_the_files_of_the_run(orders, items, capsys):
    """Neither its log nor the item file next to it, which no flag names."""
    titles = items(item_file())
    for path, words in ((orders / 'orders.csv', "the run's log"), (titles, "the run's items")):
        before = path.read_text()
        capsys.readouterr()
        assert use(orders / 'run', 'recommend', f'--out={path}') == 2
        assert f'is the file of {words}; write to another' in capsys.readouterr().err
        assert path.read_text() == before


def test_the_three_forms_of_a_file_have_equal_contents(orders, items, tmp_path):
    items(item_file())
    (tmp_path / 'in.jsonl').write_text('{"user": "ann", "items": [" i1", "i2 "]}\n["who?"]\n')
    for name in ('o.jsonl', 'o.csv', 'o.parquet'):
        flags = [f'--histories={tmp_path}/in.jsonl', f'--out={tmp_path}/{name}', '--top_k=4']
        assert use(orders / 'run', 'recommend', *flags) == 0
    ann, stranger = lines(tmp_path / 'o.jsonl')
    assert not {'i1', 'i2'} & {*ann['items']} and 'unknown' not in ann
    assert ann['score_kind'] in ('dot product', 'cosine / temperature')
    table = pl.read_parquet(tmp_path / 'o.parquet')
    kinds = [ann['score_kind']] * 4 + ['number of actions'] * 4
    assert table['score_kind'].to_list() == kinds
    assert table['item'].to_list() == ann['items'] + stranger['items']
    assert table['title'].to_list() == ann['titles'] + stranger['titles']
    assert table['score'].to_list() == [*map(pytest.approx, ann['scores']), *[None] * 4]
    assert table['count'].to_list() == [*[None] * 4, *stranger['counts']]
    again = pl.read_csv(tmp_path / 'o.csv')
    assert again['title'].to_list() == table['title'].to_list()
    assert again['count'].to_list() == table['count'].to_list()


@pytest.mark.parametrize('stay', [False, True])
def test_items_of_a_history_stay_where_the_run_was_selected_without_a_mask(
    orders, tmp_path, stay, capsys
):
    """Unless a flag says otherwise; an export keeps the default."""
    run, out = tmp_path / 'run', tmp_path / 'o.jsonl'
    select_on = f'--select_on={"unmasked" if stay else "masked"}'
    argv = [*orders_flags(orders), f'--workdir={run}', select_on]
    assert main([*argv, '--stages=prepare,pretrain']) == 0
    (tmp_path / 'in.jsonl').write_text('["i1", "i2", "i3"]\n')
    flags = [f'--histories={tmp_path}/in.jsonl', '--top_k=20', '--progress=lines']
    for more, stays in (([], stay), (['--filter_seen'], False), (['--nofilter_seen'], True)):
        capsys.readouterr()
        argv = [f'--workdir={run}', '--stages=recommend', f'--out={out}', *flags, *more]
        assert main(argv) == 0
        assert ({'i1', 'i2', 'i3'} <= {*lines(out)[0]['items']}) == stays
        shown = capsys.readouterr()
        assert ('--filter_seen leaves them out' in shown.out + shown.err) == (stays and not more)
    recommender = load(run)
    assert (len(recommender.recommend(['i1'], 99).items) == 20) == stay
    assert len(recommender.recommend(['i1'], 99, filter_seen=True).items) == 19
    assert (len(recommender.explain(['i1'], 99).recommended) == 20) == stay
    recommender.export(tmp_path / 'export')
    assert load(tmp_path / 'export').filter_seen != stay

"""The page and the table of a comparison contain its figures, whatever the names of the runs."""

import json
import re

import pytest
from fixtures import Reader
from report_fixtures import ODD_NAMES, edit_results, make_compared_run

from fame_jax.report import comparison_page
from fame_jax.report.comparison import compare
from fame_jax.report.figures_of_runs import MOST
from fame_jax.report.html import number
from fame_jax.screen import short

SWEEP = {
    'selected_by': 'validation NDCG@20, masked',
    'best': 'x=2',
    'settings': [
        {'name': f'x={n}', 'flags': {'x': str(n)}, 'validation': [0.1 * n, 0.2 * n]} for n in (2, 1)
    ],
}


def rows_of(source):
    return [
        [re.sub('<[^>]*>', '', cell) for cell in re.findall('<t[dh][^>]*>(.*?)</t[dh]>', row)]
        for row in re.findall('<tr.*?>(.*?)</tr>', source)
    ]


def sections(source):
    return re.findall('<section id="([a-z]+-[0-9])">', source)


def section_of(source, name):
    return source[source.index(f'<section id="{name}">') :].split('</section>')[0]


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    """Two runs, one of two seeds, one of another split, and a sweep."""
    folder = tmp_path_factory.mktemp('runs')
    paths = [make_compared_run(folder / 'a', 0, better=20, stages=('pretrain', 'finetune'))]
    paths.append(make_compared_run(folder / 'b', 3, config={'learning_rate': 0.01}))
    for seed in (0, 1):
        make_compared_run(folder / 'seeds' / f'seed_{seed}', seed + 5, card={'seed': seed})
    paths.append(folder / 'seeds')
    by_time = {'split': 'time', 'split_at': '0.8'}
    paths.append(make_compared_run(folder / 'other', 1, config=by_time, split_at=0.8))
    make_compared_run(folder / 'sweep' / 'x=2', 2, config={'pretrain_epochs': 2})
    (folder / 'sweep' / 'sweep.json').write_text(json.dumps(SWEEP))
    return compare([*paths, folder / 'sweep'])


@pytest.fixture(scope='module')
def source(found):
    return comparison_page.page(found)


def test_the_page_has_its_sections_and_is_self_contained(source):
    topics = ('metrics', 'curves', 'settings', 'groups', 'coverage', 'runs')
    of_first = [f'{topic}-0' for topic in topics]
    of_second = [f'{topic}-1' for topic in topics if topic != 'settings']  # of a single run
    assert sections(source) == [*of_first, *of_second, 'splits-0', 'sweep-0']
    reader = Reader(source)
    assert reader.faults == []
    assert not {'script', 'link', 'iframe', 'object', 'form'} & {tag for tag, _ in reader.tags}
    for tag, attributes in reader.tags:
        for name in ('src', 'href', 'action', 'xlink:href'):
            assert re.match('#|data:image/svg', attributes.get(name) or '#'), (tag, attributes)
    ids = [attributes['id'] for _, attributes in reader.tags if 'id' in attributes]
    assert len(ids) == len(set(ids)) > 50
    assert comparison_page.GENERATOR in source[:500]


def test_every_table_scrolls_within_its_frame(source):
    frames = re.findall('<div class="wide" tabindex="0"><table>', source)
    assert len(frames) == source.count('<table') > 8


def test_the_metrics_have_the_difference_its_interval_and_the_seeds(found, source):
    section = found.sections[0]
    rows = {row[0]: row for row in rows_of(section_of(source, 'metrics-0')) if row[0]}
    unmasked = {row[0]: row for row in rows_of(section_of(source, 'metrics-0'))}
    test = section.tests['seeds']
    for of_protocol, interval in (
        (rows_of(section_of(source, 'metrics-0'))[3], test['masked'].interval),
        (unmasked['seeds'], test['unmasked'].interval),
    ):
        assert of_protocol[0] == 'seeds' and ' ± ' in of_protocol[1]
        assert of_protocol[2] == short(interval.difference, '+')
        assert of_protocol[3] == f'{short(interval.low, "+")} to {short(interval.high, "+")}'
        share = 100 * interval.difference / interval.second
        assert of_protocol[4] == f'{share:+.1f} %'
    assert rows['a'][3] == 'reference' and '<tr class="floor"><td class="name"><bdi>POP' in source
    best = section.best.name
    assert f'<tr class="main"><td class="name"><bdi>{best}' in source


def test_the_headline_names_the_best_by_validation_with_its_interval(found, source):
    header = re.sub('<[^>]*>', '', source[source.index('<header>') : source.index('<nav')])
    section = found.sections[0]
    interval = section.tests[section.best.name]['masked'].interval
    assert section.best.name == 'seeds'  # whose validation figures are the largest
    assert 'The best run by validation NDCG@20 (masked) is seeds' in header
    assert str(interval) in header
    assert 'Ended at a limit of epochs and not by patience: x=2;' in header
    targets = found.splits[0].targets[1]
    assert f'last: 40 users, 20 items. {targets} test targets.' in header
    assert 'other: other split than a; figures of different sections cannot be compared' in header


def test_settings_that_differ_are_a_row_each(source):
    rows = rows_of(section_of(source, 'settings-0'))
    assert rows[0] == ['', 'a', 'b', 'seeds', 'x=2']
    assert ['--learning_rate', '0.001', '0.01', '0.001', '0.001'] in rows
    assert not any(row[0] in ('--patience', '--workdir') for row in rows)


def test_the_splits_are_columns_of_one_table(found, source):
    """A row of the model that both have, and one of the baseline, on the page and as text."""
    (splits,) = found.splits
    table = rows_of(section_of(source, 'splits-0'))
    assert table[0] == [
        '',
        *(f'{metric}, leave one out' for metric in ('HR@10', 'NDCG@10')),
        *(f'{metric}, by time at 0.8, last' for metric in ('HR@10', 'NDCG@10')),
    ]
    assert [row[0] for row in table[1:3]] == ['PRETRAIN', 'POPULARITY']
    seeds, other = splits.rows[0].runs
    assert (seeds.name, other.name) == ('seeds', 'other')
    of_seeds = seeds.spread('test', 'masked', 'ndcg@10')
    assert table[1][2] == f'{number(of_seeds["mean"])} ± {number(of_seeds["sd"])}'
    assert table[1][4] == number(other.spread('test', 'masked', 'ndcg@10')['mean'])
    text = comparison_page.terminal(found)
    assert 'unmasked, each split' in text and f'40 (leave one out), {splits.targets[1]} (' in text


def test_curves_are_by_stage_and_by_the_users_that_select(found, tmp_path):
    first = make_compared_run(tmp_path / 'a', 0)
    second = make_compared_run(tmp_path / 'b', 1)
    one = section_of(comparison_page.page(compare([first, second])), 'curves-0')
    assert one.count('<figure>') == 1 and 'of a, b' in one
    edit_results(second, lambda card, _: card.update(selection='on a sample of 9 users'))
    two = section_of(comparison_page.page(compare([first, second])), 'curves-0')
    assert two.count('<figure>') == 2 and 'on a sample of 9 users' in two


def test_charts_of_many_runs_say_which_are_drawn(tmp_path):
    folders = [make_compared_run(tmp_path / f'run{n}', n) for n in range(MOST + 2)]
    source = comparison_page.page(compare(folders, 'run9'))
    assert f'{MOST} of the {MOST + 2} runs are drawn' in source
    curves = section_of(source, 'curves-0')
    assert 'of run9, run0,' in curves and 'run8' not in curves
    rows = rows_of(section_of(source, 'metrics-0'))
    assert {f'run{n}' for n in range(MOST + 2)} <= {row[0] for row in rows}


@pytest.mark.parametrize('name', [ODD_NAMES[0], ODD_NAMES[2], ODD_NAMES[6], ODD_NAMES[-1]])
def test_odd_names_are_text(tmp_path, name):
    folder = name.replace('/', '_')
    paths = [make_compared_run(tmp_path / folder, 0), make_compared_run(tmp_path / 'b', 1)]
    edit_results(paths[0], lambda card, _: card['config'].update(loss=name))
    edit_results(paths[0], lambda card, _: card['dataset'].update(name=name))
    found = compare(paths)
    source = comparison_page.page(found)
    reader = Reader(source)
    assert reader.faults == [] and 'script' not in {tag for tag, _ in reader.tags}
    assert 'onerror' not in str(reader.tags)
    assert 'b' in comparison_page.terminal(found)


def test_the_terminal_has_both_protocols_flags_and_the_sweep(found):
    text = comparison_page.terminal(found)
    for protocol in ('masked', 'unmasked'):
        assert len(re.findall(f'^{protocol} ', text, re.MULTILINE)) == 2
    interval = found.sections[0].tests['b']['masked'].interval
    low, high = short(interval.low, '+'), short(interval.high, '+')
    assert re.search(rf'^b .* {re.escape(f"{low} to {high}")}', text, re.MULTILINE)
    assert re.search('^--learning_rate +0.001 +0.01 +0.001 +0.001$', text, re.MULTILINE)
    assert re.search(r'^x=2 +\.3000 ± \.1414$', text, re.MULTILINE)
    assert text.endswith(
        'other: other split than a; figures of different sections cannot be compared'
    )


def test_a_sweep_can_be_the_reference(tmp_path):
    make_compared_run(tmp_path / 'sweep' / 'x=2')
    (tmp_path / 'sweep' / 'sweep.json').write_text(json.dumps(SWEEP))
    other = make_compared_run(tmp_path / 'a', 1)
    found = compare([other, tmp_path / 'sweep'], f'{tmp_path}/sweep')
    assert found.sections[0].reference.name == 'x=2'


def test_a_run_alone_and_a_sweep_whose_best_has_no_results(tmp_path):
    folder = make_compared_run(tmp_path / 'a')
    source = comparison_page.page(compare([folder]))
    assert '<h1><bdi>1 run on toys</bdi></h1>' in source and 'settings-0' not in source
    (tmp_path / 'sweep' / 'x=2').mkdir(parents=True)
    (tmp_path / 'sweep' / 'sweep.json').write_text(json.dumps(SWEEP))
    source = comparison_page.page(compare([tmp_path / 'sweep']))
    assert '<h1><bdi>Sweep sweep</bdi></h1>' in source and sections(source) == ['sweep-0']
    assert 'x=2 is left out: it has no results' in source

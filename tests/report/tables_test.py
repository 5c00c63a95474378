"""Tables of hand-made runs: means over seeds, paired tests, notes, and mistakes of the user."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fame_jax import config
from fame_jax.errors import UserError
from fame_jax.evaluation import lists, significance
from fame_jax.evaluation.metrics import PROTOCOLS, metrics
from fame_jax.report import tables

RESULTS = Path(__file__).parents[2] / 'benchmarks' / 'results'
MACHINE = {
    'code': '0.1.0',
    'versions': {'python': '3.11.7', 'jax': '0.10.2'},
    'device': {'kind': 'cpu', 'count': 1},
    'cores': 2,
    'date': '2026-11-26',
}
SETTINGS = {'loss': 'ce', 'item_init': 'random', 'row_length': 64, 'backbone': 'pretrain'}
TITLES = {'fame': 'FAME (H 2, N 8)', 'sasrec': 'SASRec', 'core': 'CORE'}
BACKBONE = {'fame': 'sasrec'}


def figures(rank_U):
    return {split: {p: metrics(rank_U) for p in PROTOCOLS} for split in tables.SPLITS}


def make_run(folder, model, seed, fingerprint='a', dataset='toys', with_ranks=True, **config):
    """A run's results.json and ranks.npz; FAME's run has its backbone's figures too."""
    of_stage = {'pretrain': BACKBONE.get(model, model)}
    of_stage |= {'finetune': model} if model in BACKBONE else {}
    shift = {'fame': 0, 'core': 3, 'sasrec': 1}
    ranks = {
        stage: np.random.default_rng(seed).integers(1, 40, 50) + shift[name]
        for stage, name in of_stage.items()
    }
    training = {'epochs': 10 + seed, 'best_epoch': 7, 'seconds': 60.0, 'parameters': 1234}
    card = {'name': dataset, 'fingerprint': fingerprint, 'users': 50, 'items': 60}
    results = {
        'card': {
            'dataset': card,
            'seed': seed,
            'config': {**SETTINGS, 'seed': seed, 'model': model, **config},
            'stages': {stage: training | {'machine': MACHINE} for stage in of_stage},
        },
        'results': {
            'popularity': {'model': 'popularity', **figures(np.full(50, 30))},
            'item_graph': {'model': 'item graph', **figures(np.full(50, 20))},
            **{s: {'model': TITLES[name], **figures(ranks[s])} for s, name in of_stage.items()},
        },
    }
    folder.mkdir(parents=True)
    (folder / 'results.json').write_text(json.dumps(results))
    if with_ranks:
        names = {f'{s}/test/{p}': ranks[s] for s in ranks for p in PROTOCOLS}
        np.savez(folder / 'ranks.npz', **names)
    return folder


@pytest.fixture
def runs(tmp_path):
    """FAME of three seeds, CORE of two."""
    wanted = [('fame', 0), ('fame', 1), ('fame', 2), ('core', 0), ('core', 1)]
    return [make_run(tmp_path / f'{m}_seed{s}', m, s) for m, s in wanted]


def row_of(collected, title):
    return next(row for row in collected['datasets']['toys']['rows'] if row['title'] == title)


def test_a_row_is_the_mean_and_deviation_over_its_seeds(runs):
    collected = tables.collect(*tables.read_runs(runs))
    rows = collected['datasets']['toys']['rows']
    floors, trained = ['popularity', 'item graph'], ['SASRec', 'FAME (H 2, N 8)', 'CORE']
    assert [row['title'] for row in rows] == floors + trained
    fame = row_of(collected, 'FAME (H 2, N 8)')
    assert fame['seeds'] == [0, 1, 2] and fame['epochs'] == [10, 11, 12]
    stored = [json.loads((run / 'results.json').read_text()) for run in runs[:3]]
    values = [one['results']['finetune']['test']['masked']['ndcg@10'] for one in stored]
    mean = sum(values) / 3
    deviation = (sum((value - mean) ** 2 for value in values) / 2) ** 0.5
    assert fame['test']['masked']['ndcg@10'] == {
        'mean': pytest.approx(mean),
        'sd': pytest.approx(deviation),
        'values': values,
    }
    assert row_of(collected, 'CORE')['seeds'] == [0, 1]


def test_what_is_not_trained_is_a_row_without_seeds(runs):
    """Data that are too large for the item graph, and earlier versions, have popularity alone."""
    for run in runs[:2]:
        edit(run, lambda card, results: results.pop('item_graph'))
    collected = tables.collect(*tables.read_runs(runs))
    row = row_of(collected, 'item graph')
    assert (row['model'], row['seeds'], row['machines']) == ('item_graph', [], [])
    assert row['test']['masked']['ndcg@20'] == tables.spread([1 / np.log2(21)])
    for line in ('| popularity |  | .0000', '| item graph |  | .0000 | .0000 | 1.0000'):
        assert tables.markdown(collected).count(line) == len(PROTOCOLS)
    collected = tables.collect(*tables.read_runs(runs[:2]))
    titles = [row['title'] for row in collected['datasets']['toys']['rows']]
    assert titles == ['popularity', 'SASRec', 'FAME (H 2, N 8)']


def test_one_seed_has_no_deviation():
    assert tables.spread([0.5]) == {'mean': 0.5, 'sd': None, 'values': [0.5]}


def test_every_row_is_tested_against_one_over_the_seeds_that_both_have(runs):
    collected = tables.collect(*tables.read_runs(runs), against='FAME')
    tests = collected['datasets']['toys']['tests']
    assert [(t['second'], t['protocol'], t['metric']) for t in tests] == [
        (second, protocol, f'ndcg@{k}')
        for second in ('SASRec', 'CORE')
        for protocol in PROTOCOLS
        for k in tables.TESTED
    ]
    core = next(test for test in tests if test['second'] == 'CORE')
    assert core['seeds'] == [0, 1] and core['users'] == 50

    def mean(model, stage):
        ranks = [np.load(run / 'ranks.npz')[f'{stage}/test/masked'] for run in model]
        return np.mean([significance.ndcg(rank_U, 10) for rank_U in ranks])

    assert core['first_mean'] == pytest.approx(mean(runs[:2], 'finetune'))
    assert core['second_mean'] == pytest.approx(mean(runs[3:], 'pretrain'))
    assert core['difference'] == pytest.approx(core['first_mean'] - core['second_mean'])
    assert core['low'] < core['difference'] < core['high'] and core['difference'] > 0


def test_published_figures_stand_under_the_first_row_of_their_model(runs):
    collected = tables.collect(*tables.read_runs(runs))
    lines = tables.markdown(collected).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith('| FAME') or '**FAME' in line)
    assert lines[at + 1].startswith("| *FAME's Table 2") and '*.1065*' in lines[at + 1]
    alone = tables.collect(*tables.read_runs(runs), with_published=False)
    assert 'Table 2' not in tables.markdown(alone)


def test_the_page_has_both_protocols_and_marks_the_best_by_validation(runs):
    text = tables.markdown(tables.collect(*tables.read_runs(runs), against='fame'))
    assert '## toys: 50 users, 60 items' in text
    assert '### Masked' in text and '### Unmasked' in text
    assert text.count('| **FAME (H 2, N 8)** | 3 |') == 2 and ' ± ' in text
    assert '| 10 to 12 | 60 | 1,234 |' in text
    assert '### FAME (H 2, N 8) against the others' in text
    assert 'Machine: 1 x cpu, 2 cores, python 3.11.7, jax 0.10.2' in text


def test_a_repeated_seed_counts_once_and_different_settings_are_noted(tmp_path, runs):
    more = [
        make_run(tmp_path / 'again', 'sasrec', 0),
        make_run(tmp_path / 'longer', 'core', 2, row_length=99, backbone='elsewhere'),
    ]
    collected = tables.collect(*tables.read_runs([*runs, *more]))
    assert collected['datasets']['toys']['notes'] == [
        'SASRec, seed 0: taken from fame_seed0, not from again',
        'CORE: its runs differ in row_length (64, 99)',
    ]
    assert len(row_of(collected, 'SASRec')['seeds']) == 3
    assert row_of(collected, 'CORE')['seeds'] == [0, 1, 2]


def test_all_settings_of_training_loss_and_text_are_compared_but_folders_and_files():
    sections = ('text', 'loss', 'training', 'finetune')
    bound = {name for name in config.FLAGS if config.binds(name) in sections}
    assert set(tables.COMPARED) == bound - {'backbone', 'items'}


def edit(run, change):
    """Changes a run's results.json in place."""
    path = run / 'results.json'
    stored = json.loads(path.read_text())
    change(stored['card'], stored['results'])
    path.write_text(json.dumps(stored))


def test_lists_and_the_order_test_are_columns_where_a_run_has_them(runs):
    def add(card, results):
        for stage, value in (('popularity', 0.125), ('pretrain', 0.25), ('finetune', 0.5)):
            results[stage]['lists'] = {'masked': dict.fromkeys(lists.COLUMNS, value)}
            results[stage]['shuffled'] = results['pretrain']['test']

    for run in runs[:3]:
        edit(run, add)
    collected = tables.collect(*tables.read_runs(runs))
    fame = row_of(collected, 'FAME (H 2, N 8)')
    assert fame['lists']['masked']['novelty@10'] == tables.spread([0.5] * 3)
    assert fame['shuffled'] == row_of(collected, 'SASRec')['test']
    masked, unmasked = tables.markdown(collected).split('### ')[1:3]
    head = ['shuffled NDCG@10', *lists.COLUMNS, 'epochs', 'seconds', 'parameters']
    cells = [[c.strip() for c in line.split('|')][1:-1] for line in masked.splitlines()[2:]]
    assert len({len(row) for row in cells if row}) == 1
    assert cells[0][-9:] == head and cells[0][-10] == 'validation NDCG@20'
    (row,) = (row for row in cells if row and 'FAME (H' in row[0])
    assert row[-8:-3] == ['0.5000', '0.5000', '0.50', '0.5', '0.5000'] and ' ± ' in row[-9]
    (row,) = (row for row in cells if row[:1] == ['CORE'])  # its runs have neither
    assert row[-9:-3] == [''] * 6
    assert 'shuffled NDCG@10 | epochs' in unmasked  # lists are those of one ranking


def test_the_best_row_is_that_of_the_selected_ranking(runs):
    def repeat(card, results):
        card |= {'select_on': 'unmasked', 'repeats': {'validation': 0.6, 'test': 0.625}}
        if card['config']['model'] == 'core':
            results['pretrain']['validation']['unmasked']['ndcg@20'] = 1.0

    assert '**CORE**' not in tables.markdown(tables.collect(*tables.read_runs(runs)))
    for run in runs[:4]:
        edit(run, repeat)
    text = tables.markdown(tables.collect(*tables.read_runs(runs[:4])))
    assert '**CORE**' in text and '**FAME' not in text
    assert '62.5% of the test targets stand in the history of their user' in text
    assert 'are by validation NDCG@20, unmasked' in text
    text = tables.markdown(tables.collect(*tables.read_runs(runs)))
    assert 'Note: best epochs were selected by the masked ranking in some runs only.' in text


def test_a_stage_that_ended_at_its_limit_is_a_note(runs):
    def limit(card, results):
        card['config'] |= {'pretrain_epochs': 60, 'finetune_epochs': 11, 'patience': 5}

    edit(runs[1], limit)  # both stages had 11 epochs, the best was 7
    collected = tables.collect(*tables.read_runs(runs))
    line = 'finetune ended at its limit of 11 epochs (best epoch 7)'
    notes = [note for note in collected['datasets']['toys']['notes'] if 'limit' in note]
    assert len(notes) == 1 and notes[0].startswith(f'FAME (H 2, N 8), seed 1: {line}')


def test_runs_of_an_earlier_version_had_the_defaults_of_newer_flags(tmp_path):
    runs = [
        make_run(tmp_path / 'old', 'core', 0),
        make_run(tmp_path / 'new', 'core', 1, select_on='auto'),
    ]
    assert tables.collect(*tables.read_runs(runs))['datasets']['toys']['notes'] == []
    other = make_run(tmp_path / 'other', 'core', 2, select_on='unmasked')
    assert tables.collect(*tables.read_runs([*runs, other]))['datasets']['toys']['notes'] == [
        'CORE: its runs differ in select_on (auto, unmasked)'
    ]


def test_runs_without_ranks_are_not_tested(tmp_path):
    runs = [
        make_run(tmp_path / 'fame', 'fame', 0, with_ranks=False),
        make_run(tmp_path / 'core', 'core', 0),
    ]
    collected = tables.collect(*tables.read_runs(runs), against='fame')['datasets']['toys']
    assert collected['tests'] == []
    assert any('CORE is not tested' in note for note in collected['notes'])


def test_two_data_sets_make_two_tables(tmp_path):
    runs = [make_run(tmp_path / name, 'core', 0, dataset=name) for name in ('toys', 'beauty')]
    assert list(tables.collect(*tables.read_runs(runs))['datasets']) == ['toys', 'beauty']


def test_two_splits_of_a_data_set_make_two_tables(tmp_path):
    """Each with its own runs, baselines and heading; other authors' figures are leave one out."""
    counts = {'targets': 9, 'users': 8, 'targets_without_training': 2, 'users_without_training': 1}
    by_time = {'moment': '2020-02-01T00:00:00Z', 'validation_moment': '2020-01-01T00:00:00Z'}
    by_time |= {'targets': 'successive', 'test': counts}
    one = make_run(tmp_path / 'one', 'fame', 0)
    other = make_run(tmp_path / 'other', 'fame', 0, fingerprint='b')
    edit(other, lambda card, results: card.update(time_split=by_time))
    edit(other, lambda card, results: results['popularity'].update(figures(np.full(50, 7))))
    found = tables.collect(*tables.read_runs([one, other]))['datasets']
    name = 'toys, split by time at 2020-02-01T00:00:00Z, successive'
    assert [*found] == ['toys', name]
    for table, value in ((found['toys'], 0), (found[name], 1 / 3)):
        popularity, *_, fame = table['rows']
        assert popularity['test']['masked']['ndcg@20']['mean'] == pytest.approx(value)
        assert fame['seeds'] == [0]
    assert found['toys']['published']['masked'] and not found[name]['published']['masked']
    page = tables.markdown({'datasets': found})
    assert 'leave one out except where' in page and f'## {name}:' in page
    assert '9 targets of 8 users. 2 targets and 1 users have no training action.' in page
    # Two runs of the same name of split on other data are still a mistake.
    third = make_run(tmp_path / 'third', 'fame', 1, fingerprint='c')
    edit(third, lambda card, results: card.update(time_split=by_time))
    with pytest.raises(UserError, match='have different data'):
        tables.collect(*tables.read_runs([other, third]))


def test_the_command_writes_files_that_it_reads_again(runs, tmp_path, capsys):
    out = tmp_path / 'new' / 'out'
    paths = [str(run / 'results.json') for run in runs]
    assert tables.main([*paths, '--against=FAME', f'--out={out}']) == 0
    text = capsys.readouterr().out
    assert (out / 'tables.md').read_text() == text
    assert tables.main([str(out / 'tables.json')]) == 0
    assert capsys.readouterr().out == text


def test_a_file_of_several_runs_by_name(runs, tmp_path):
    several = {run.name: json.loads((run / 'results.json').read_text()) for run in runs}
    path = tmp_path / 'several.json'
    path.write_text(json.dumps(several))
    one, other = (tables.collect(*tables.read_runs(p)) for p in ([path], runs))
    assert one == other


def test_mistakes_are_one_line_and_code_2(runs, tmp_path, capsys):
    other = make_run(tmp_path / 'other', 'core', 5, fingerprint='b')
    broken = tmp_path / 'broken.json'
    broken.write_text('{"results": {}}')
    (runs[3] / 'ranks.npz').write_text('no archive')
    for arguments, message in [
        ([tmp_path / 'nothing'], 'nothing/results.json'),
        ([*runs, other], 'have different data'),
        ([*runs, '--against=CL4SRec'], 'names 0 rows; give one of SASRec, FAME (H 2, N 8), CORE'),
        ([broken], 'broken.json'),
        ([*runs, '--against=FAME'], 'ranks.npz has no ranks'),
    ]:
        assert tables.main([str(argument) for argument in arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith('error: ') and message in line


@pytest.mark.parametrize('name', ['table2_toys_seed0', 'sweep_scientific_seed0'])
def test_stored_tables_are_rendered_from_their_figures(name):
    stored = json.loads((RESULTS / f'{name}.json').read_text())
    assert tables.markdown(stored) == (RESULTS / f'{name}.md').read_text()


def test_published_rows_need_the_loss_of_the_paper():
    def name(stage, **settings):
        return tables.published_name(SETTINGS | settings, stage)

    assert name('pretrain', model='fame') == 'sasrec'
    assert name('pretrain', model='sasrec', loss='bce') == 'sasrec_bce'
    assert name('finetune', model='fame', item_init='text') == 'fame_plus'


def test_tables_need_no_jax():
    program = 'import sys, fame_jax.report.tables; sys.exit("jax" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', program]).returncode == 0

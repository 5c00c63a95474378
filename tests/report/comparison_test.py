"""Runs side by side: differences by loops over users, and nothing that cannot be compared."""

import json
import math
import shutil

import numpy as np
import pytest
from report_fixtures import COMPARED_USERS, edit_results, make_compared_run

from fame_jax.errors import UserError
from fame_jax.report.comparison import compare


def ndcg(rank):
    return 1 / math.log2(1 + rank) if rank <= 10 else 0.0


def ranks_of(folder, protocol, stage='pretrain'):
    return np.load(folder / 'ranks.npz')[f'{stage}/test/{protocol}'].tolist()


def mean(values):
    values = list(values)
    return sum(values) / len(values)


@pytest.fixture
def runs(tmp_path):
    """Two runs, and one of three seeds, one of which the first run has too."""
    first = make_compared_run(tmp_path / 'a', 0, better=30)
    second = make_compared_run(tmp_path / 'b', 5, better=10, config={'learning_rate': 0.01})
    for seed in (0, 1, 5):
        make_compared_run(tmp_path / 'seeds' / f'seed_{seed}', seed)
    return first, second, tmp_path / 'seeds'


@pytest.mark.parametrize('protocol', ['masked', 'unmasked'])
def test_a_difference_is_paired_over_users_and_a_mean_over_seeds(runs, protocol):
    (section,) = compare(runs).sections
    first = [ndcg(rank) for rank in ranks_of(runs[0], protocol)]
    seeds = [ranks_of(runs[2] / f'seed_{seed}', protocol) for seed in (0, 1, 5)]
    over_seeds = [mean(ndcg(of_seed[u]) for of_seed in seeds) for u in range(COMPARED_USERS)]
    differences = [ours - theirs for ours, theirs in zip(over_seeds, first)]
    found = section.tests['seeds'][protocol].interval
    assert found.difference == pytest.approx(mean(differences)) and found.difference < 0
    sd = math.sqrt(sum((d - mean(differences)) ** 2 for d in differences) / (COMPARED_USERS - 1))
    assert found.high - found.low == pytest.approx(2 * 2.023 * sd / math.sqrt(40), rel=1e-3)
    assert (found.first, found.second) == pytest.approx((mean(over_seeds), mean(first)))
    assert 'a' not in section.tests and section.reference.name == 'a'


def test_the_differences_of_single_seeds_are_of_those_that_both_have(runs, tmp_path):
    for seed in (1, 5, 8):
        make_compared_run(tmp_path / 'more' / f'seed_{seed}', seed + 20, card={'seed': seed})
    (section,) = compare([runs[2], tmp_path / 'more', runs[0]]).sections
    expected = [
        mean(map(ndcg, ranks_of(tmp_path / 'more' / f'seed_{seed}', 'masked')))
        - mean(map(ndcg, ranks_of(runs[2] / f'seed_{seed}', 'masked')))
        for seed in (1, 5)
    ]
    assert section.tests['more']['masked'].each == pytest.approx(expected)
    assert section.tests['a']['masked'].each == ()  # one seed in common shows no spread


def test_a_run_may_have_the_name_of_a_baseline(runs, tmp_path):
    again = make_compared_run(tmp_path / 'popularity', 9)
    (section,) = compare([runs[0], again]).sections
    theirs = mean(map(ndcg, ranks_of(again, 'masked')))
    assert section.tests['popularity']['masked'].interval.first == pytest.approx(theirs)
    theirs = mean(map(ndcg, ranks_of(runs[0], 'masked', 'popularity')))
    assert section.baselines['popularity']['masked'].interval.first == pytest.approx(theirs)


def test_baselines_are_tested_too(runs):
    (section,) = compare(runs[:1]).sections
    theirs = mean(map(ndcg, ranks_of(runs[0], 'masked', 'popularity')))
    ours = mean(map(ndcg, ranks_of(runs[0], 'masked')))
    difference = section.baselines['popularity']['masked'].interval.difference
    assert difference == pytest.approx(theirs - ours)


@pytest.mark.parametrize('against', ['b', '{}/b', '{}/b/'])
def test_the_reference_is_a_run_of_the_command(runs, tmp_path, against):
    (section,) = compare(runs, against.format(tmp_path)).sections
    assert section.reference.name == 'b' and [*section.tests] == ['a', 'seeds']


def test_means_and_deviations_over_seeds(runs):
    *_, seeds = compare(runs).sections[0].runs
    values = [mean(map(ndcg, ranks_of(runs[2] / f'seed_{s}', 'masked'))) for s in (0, 1, 5)]
    found = seeds.spread('test', 'masked', 'ndcg@10')
    assert found['values'] == pytest.approx(values) and found['mean'] == pytest.approx(mean(values))
    assert found['sd'] == pytest.approx(np.std(values, ddof=1))
    assert seeds.seeds == [0, 1, 5] and seeds.spread('test', 'masked', 'nothing') is None


def test_the_best_run_is_that_of_validation_and_not_of_test(runs):
    """Run a is the best on test; b has the larger validation figure."""
    (section,) = compare(runs).sections
    tested = {run.name: run.spread('test', 'masked', 'ndcg@10')['mean'] for run in section.runs}
    assert max(tested, key=tested.get) == 'a' and section.best.name == 'b'
    edit_results(runs[0], lambda card, results: results['pretrain'].pop('validation'))
    assert compare(runs).sections[0].best is None


@pytest.mark.parametrize(
    'change, word',
    [
        (lambda card: card['dataset'].update(fingerprint='another'), 'data'),
        (lambda card: card.update(split='the last day'), 'split'),
        (lambda card: card.update(candidates='100 sampled items'), 'candidates'),
        (lambda card: card.update(ties='count half'), 'ties'),
        (lambda card: card.update(select_on='unmasked'), 'select_on'),
    ],
)
def test_what_cannot_be_compared_is_in_a_section_of_its_own(runs, change, word):
    edit_results(runs[1], lambda card, results: change(card))
    found = compare(runs)
    assert [[run.name for run in one.runs] for one in found.sections] == [['a', 'seeds'], ['b']]
    assert [one.title for one in found.sections] == ['toys', 'toys (2)']
    assert 'b' not in found.sections[0].tests
    assert not found.sections[1].tests
    (note,) = found.notes
    assert note.startswith(f'b: other {word} than a')


def test_a_model_in_several_splits_is_a_row(runs, tmp_path):
    """With equal settings, whatever the seed; the runs of both splits have the same data."""
    by_time = {'split': 'time', 'split_at': '0.8'}
    for seed in (2, 3):
        make_compared_run(
            tmp_path / 'time' / f'seed_{seed}', seed, config=by_time, split_at=0.8, better=seed
        )
    late = make_compared_run(tmp_path / 'late', config=by_time | {'split_at': '0.9'}, split_at=0.9)
    other = make_compared_run(
        tmp_path / 'other', config=by_time | {'learning_rate': 0.5}, split_at=0.8
    )
    found = compare([*runs, tmp_path / 'time', late, other])
    titles = [section.title.partition(' at ')[0] for section in found.sections]
    assert titles == ['toys', 'toys, split by time', 'toys, split by time']
    assert [[run.name for run in one.runs] for one in found.sections][1:] == [
        ['time', 'other'],
        ['late'],
    ]
    (splits,) = found.splits
    assert splits.names == ['leave one out', 'by time at 0.8, last', 'by time at 0.9, last']
    assert splits.targets == [
        COMPARED_USERS,
        *(len(ranks_of(one, 'masked')) for one in (tmp_path / 'time' / 'seed_2', late)),
    ]
    assert [(row.title, [run.name for run in row.runs]) for row in splits.rows] == [
        ('PRETRAIN', ['seeds', 'time', 'late']),
        ('POPULARITY', ['a', 'time', 'late']),
    ]
    row = splits.rows[0]
    means = [mean(map(ndcg, ranks_of(tmp_path / 'time' / f'seed_{s}', 'masked'))) for s in (2, 3)]
    assert row.runs[1].spread('test', 'masked', 'ndcg@10')['mean'] == pytest.approx(mean(means))
    notes = [note.partition(' than ')[0] for note in found.notes]
    assert notes[:2] == ['time, other: other split', 'late: other split']
    # Of the two with the same settings the table has the one of three seeds.
    assert notes[2].startswith('a is not in the table of splits: seeds has') and len(notes) == 3


def test_there_is_no_table_of_splits_without_a_model_in_several(runs, tmp_path):
    late = make_compared_run(tmp_path / 'late', config={'learning_rate': 0.5}, split_at=0.9)
    assert not compare([*runs, late]).splits
    edit_results(runs[1], lambda card, results: card.update(select_on='unmasked'))
    assert not compare(runs).splits  # another selection is no other split


def test_no_run_is_left_out_of_the_table_of_splits_in_silence(runs, tmp_path):
    """Two runs of one split that differ in the seed alone; two models of one name."""
    by_time = {'split': 'time', 'split_at': '0.8'}
    again = make_compared_run(tmp_path / 'again', 7)
    times = [
        make_compared_run(tmp_path / f'time_{rate}', config=by_time | rates, split_at=0.8)
        for rate, rates in (('usual', {}), ('high', {'learning_rate': 0.01}))
    ]
    found = compare([*runs[:2], again, *times])
    (splits,) = found.splits
    assert [(row.title, [run.name for run in row.runs]) for row in splits.rows] == [
        ('PRETRAIN: a, time_usual', ['a', 'time_usual']),
        ('PRETRAIN: b, time_high', ['b', 'time_high']),
        ('POPULARITY', ['a', 'time_usual']),
    ]
    (note,) = (note for note in found.notes if 'table of splits' in note)
    assert note.startswith('again is not in the table of splits: a has the same settings')


def test_intervals_over_successive_targets_are_said_to_be_too_narrow(tmp_path):
    run = make_compared_run(tmp_path / 'run', split_at=0.8)
    assert not compare([run]).sections[0].notes
    edit_results(run, lambda card, _: card['time_split'].update(targets='successive'))
    (section,) = compare([run]).sections
    assert any('too narrow' in note for note in section.notes)
    # The targets of the data are others than those of the edited card.
    assert not section.groupings and any('another split now' in n for n in section.notes)


def test_groups_of_a_split_by_time_are_of_its_targets(tmp_path):
    run = make_compared_run(tmp_path / 'run', split_at=0.9)
    (section,) = compare([run]).sections
    for grouping in section.groupings:
        assert sum(row['users'] for row in grouping.rows) == len(ranks_of(run, 'masked'))
    assert len(section.groupings) == 2 and not section.notes


def test_only_flags_that_differ_are_shown(runs, tmp_path):
    (section,) = compare(runs).sections
    assert section.settings == [
        ('learning_rate', ['0.001', '0.01', '0.001']),
        ('seed', ['0', '5', '0, 1, 5']),
    ]


def test_flags_that_do_not_count_are_no_difference(tmp_path):
    """Of another model, without fine-tuning, of the data, of the device, and from a default."""
    fame = {'model': 'fame', 'model_options': ['gate_scale=one', 'remat=true'], 'num_heads': 4}
    fame |= {'finetune_epochs': 9, 'data_parallel': 2, 'k_core': 9, 'ema': 0.0}
    other = {'num_heads': None, 'finetune_epochs': 3, 'model_options': ['remat=false']}
    first = make_compared_run(tmp_path / 'a', stages=('pretrain', 'finetune'), config=fame)
    second = make_compared_run(tmp_path / 'b', config=other)
    (section,) = compare([first, second]).sections
    assert section.settings == [
        ('model', ['fame', 'sasrec']),
        ('model_options=remat', ['true', 'false']),
    ]
    fame['model_options'] = ['remat=true']
    third = make_compared_run(
        tmp_path / 'c',
        stages=('pretrain', 'finetune'),
        config=fame | {'future_targets': ['1', '2']},
    )
    (section,) = compare([first, third]).sections
    assert section.settings == [
        ('model_options=gate_scale', ['one', '']),
        ('future_targets', ['1', '1,2']),
    ]


def test_groups_of_users_are_means_over_seeds_by_a_loop(runs):
    (section,) = compare(runs).sections
    by_length, by_popularity = section.groupings
    assert (by_length.by, by_popularity.by) == ('length of history', 'popularity of the target')
    seeds = [ranks_of(runs[2] / f'seed_{seed}', 'masked') for seed in (0, 1, 5)]
    for row in by_length.rows:
        low, high = (int(row['name'].split(' to ')[n]) for n in (0, -1))
        members = [u for u in range(COMPARED_USERS) if low <= 4 + u % 5 - 1 <= high]
        assert row['users'] == len(members)
        found = row['figures']['seeds']['masked']
        values = [mean(ndcg(of_seed[u]) for of_seed in seeds) for u in members]
        assert found['ndcg@10'] == pytest.approx(mean(values))
        assert found['error'] == pytest.approx(np.std(values) / math.sqrt(len(members)))
        assert found['hr@10'] == pytest.approx(mean(s[u] <= 10 for s in seeds for u in members))


def test_the_data_are_found_beside_the_seeds_and_in_another_run(runs, tmp_path):
    shutil.move(runs[2] / 'seed_0' / 'dataset', runs[2] / 'dataset')
    for seed in (1, 5):
        shutil.rmtree(runs[2] / f'seed_{seed}' / 'dataset')
    assert compare(runs[2:]).sections[0].groupings
    shutil.rmtree(runs[1] / 'dataset')
    (section,) = compare([runs[1]]).sections
    assert not section.groupings and any('prepared data' in note for note in section.notes)
    edit_results(runs[1], lambda card, _: card['config'].update(prepared=str(runs[2])))
    assert compare([runs[1]]).sections[0].groupings
    # Data that were prepared anew are others.
    path = runs[2] / 'dataset' / 'dataset.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'fingerprint': 'new'}))
    assert not compare([runs[1]]).sections[0].groupings


def test_each_missing_piece_is_one_line(runs):
    (runs[1] / 'ranks.npz').unlink()
    (runs[1] / 'metrics.jsonl').unlink()
    edit_results(runs[1], lambda card, results: results['pretrain'].pop('lists'))
    (runs[2] / 'seed_1' / 'results.json').unlink()
    found = compare(runs)
    (section,) = found.sections
    for words in ('no ranks.npz', 'no metrics.jsonl', 'no metrics of its lists'):
        assert len([note for note in section.notes if note.startswith(f'b has {words}')]) == 1
    assert not section.tests['b'] and section.tests['seeds']
    assert 'b' not in section.groupings[0].rows[0]['figures']
    (note,) = found.notes
    assert 'seed_1 is left out: it has no results; run --stages=evaluate first' in note
    assert section.runs[2].seeds == [0, 5]


def test_a_stage_that_ended_at_its_limit_is_named_once_for_all_seeds(runs):
    for seed in (0, 5):
        folder = runs[2] / f'seed_{seed}'
        edit_results(folder, lambda card, _: card['config'].update(pretrain_epochs=2))
    (section,) = compare(runs).sections
    (note,) = section.notes
    assert note.startswith('seeds, seed 0, 5: pretrain ended at its limit of 2 epochs (best epoch')
    assert 'best epoch 2, still improving' in note


def test_runs_of_one_name_have_their_paths(runs, tmp_path):
    again = make_compared_run(tmp_path / 'other' / 'a', 1)
    names = [run.name for run in compare([runs[0], again, runs[1]]).sections[0].runs]
    assert names == [str(runs[0]), str(again), 'b']


def no_results(runs):
    (runs[0] / 'results.json').unlink()
    return runs[:1], ''


def damaged_ranks(runs):
    (runs[0] / 'ranks.npz').write_bytes(b'no archive')
    return runs, ''


def other_users(runs):
    edit_results(runs[0], lambda card, _: card['dataset'].update(users=41))
    return runs, ''


def no_metric(runs):
    edit_results(runs[0], lambda _, results: results['pretrain']['test']['masked'].pop('ndcg@10'))
    return runs, ''


def no_fingerprint(runs):
    edit_results(
        runs[0], lambda card, _: card.update(time_split={'test': {'targets': COMPARED_USERS}})
    )
    return runs, ''


def other_model_of_a_seed(runs):
    edit_results(runs[2] / 'seed_5', lambda _, results: results['pretrain'].update(model='GRU'))
    return runs, ''


def damaged_sweep(runs):
    (runs[0] / 'sweep.json').write_text('{"settings": [{"name": "a"}], "best": "a"}')
    return runs, ''


@pytest.mark.parametrize(
    'make, words',
    [
        (no_results, 'a is left out: it has no results'),
        (damaged_ranks, r'ranks\.npz cannot be read .*--stages=evaluate again'),
        (other_users, r'ranks\.npz has ranks of 40 targets and results\.json has 41'),
        (no_metric, r'results\.json is damaged; run --stages=evaluate again'),
        (no_fingerprint, r'results\.json is damaged; run --stages=evaluate again'),
        (other_model_of_a_seed, 'seed_5 and seed_0 are not the same model'),
        (damaged_sweep, r'sweep\.json is damaged'),
        (lambda runs: ([*runs, runs[0].parent / 'no'], ''), 'no is no folder of a run'),
        (lambda runs: ([*runs, runs[0] / '..' / 'a'], ''), 'a is named twice'),
        (lambda runs: (runs, 'c'), '--against=c is none of the runs; give one of a, b, seeds'),
    ],
)
def test_mistakes_are_one_line(runs, make, words):
    with pytest.raises(UserError, match=words) as error:
        compare(*make(runs))
    assert '\n' not in str(error.value)


def test_a_folder_of_several_kinds_of_runs_says_which_is_compared(runs):
    """As earlier versions let a single run, several seeds and a sweep share a workdir."""
    assert compare(runs).notes == []
    shutil.copytree(runs[0], runs[2], dirs_exist_ok=True)
    words = 'alone is compared; keep each in a folder of its own'
    of_seeds = f'{runs[2]} holds a single run and runs of the seeds 0, 1, 5'
    comparison = compare(runs[1:])
    assert comparison.notes == [f'{of_seeds}: the single run {words}']
    assert comparison.sections[0].runs[1].seeds == [0]
    (runs[2] / 'results.json').unlink()
    (runs[2] / 'checkpoints' / 'pretrain' / '7').mkdir(parents=True)
    assert compare(runs[1:]).notes == [f'{of_seeds}: the run of all seeds {words}']
    setting = {'name': 'dropout=0.1', 'flags': {'dropout': '0.1'}, 'validation': [0.5]}
    (runs[2] / 'sweep.json').write_text(json.dumps({'settings': [setting], 'best': 'dropout=0.1'}))
    make_compared_run(runs[2] / 'dropout=0.1', 3)
    comparison = compare(runs[1:])
    assert comparison.notes == [f'{of_seeds} and a sweep: the best setting {words}']
    assert comparison.sections[0].runs[1].folder == runs[2] / 'dropout=0.1'


def test_seeds_with_other_settings_are_named(runs):
    folder = runs[2] / 'seed_1'
    edit_results(folder, lambda card, _: card['config'].update(patience=9, backbone='x/seed_1'))
    assert compare(runs).notes == [
        f'{folder} has other settings than seed_0: --patience=9 (there: 5)'
    ]

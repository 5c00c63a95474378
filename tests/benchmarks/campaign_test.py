"""benchmarks/campaign.py: jobs and their order, workers made up and real, files, the report."""

import json
import re
import shutil
import sys
import time

import numpy as np
import pytest

from benchmarks import campaign, campaign_jobs, campaign_results
from benchmarks.campaign_jobs import Job
from fame_jax.config import flags
from fame_jax.models import registry
from fame_jax.stages import settings

# A worker that does what the last part of a job's name says, and finishes all other jobs.
STUB = """
import json, os, pathlib, signal, sys, time
for line in sys.stdin:
    job = json.loads(line)
    (folder,) = (pathlib.Path(a.partition('=')[2]) for a in job['argv'] if '--workdir=' in a)
    folder.mkdir(parents=True, exist_ok=True)
    code = 0
    if folder.name.startswith('sleep'):
        signal.signal(signal.SIGTERM, lambda *_: ((folder / 'saved').touch(), os._exit(143)))
        time.sleep(60)
    elif folder.name == 'crash':
        print('out of memory', file=sys.stderr, flush=True)
        os._exit(7)
    elif folder.name == 'fail':
        pathlib.Path(job['log']).write_text('one line\\nerror: no such thing\\n')
        code = 2
    elif folder.parent.name == 'data':
        time.sleep(0.3)
        (folder / 'dataset').mkdir()
        (folder / 'dataset' / 'dataset.json').write_text('{}')
    elif folder.name == 'reads' and not (folder.parents[2] / 'data/a/dataset').exists():
        code = 2
    else:
        (folder / 'results.json').write_text('{}')
    print(json.dumps({'code': code}), flush=True)
"""
SMALL = (
    '--width=8 --num_blocks=1 --num_experts=2 --max_length=10 --row_length=16 --pretrain_epochs=1 '
    '--finetune_epochs=1 --synthetic=users=60,items=40,facets=1 --shuffle_histories=all_but_last'
)


def make_jobs(*names):
    return [Job(name, ('--width=8',)) for name in names]


def run_stub(jobs, out, seconds=20.0, workers=2):
    """Runs jobs by the worker that is made up; the campaign and whether none has failed."""
    one = campaign.Campaign(jobs, out, workers=workers, command=(sys.executable, '-c', STUB))
    return one, one.run(seconds)


def states(out):
    jobs = json.loads((out / 'results.json').read_text())['jobs']
    return {name: record['state'] for name, record in jobs.items()}


def refusal(capsys, *argv):
    """The one line of a mistake."""
    assert campaign.main(['--out=no/where', *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


# The list.


def test_the_list_has_every_model_on_every_data_set_with_flags_that_it_can_have(tmp_path):
    jobs = campaign_jobs.list_jobs(campaign.MODELS, campaign.DATASETS, '0,1')
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names) == 4 * (1 + len(campaign.MODELS))
    found = set()
    for job in jobs:
        values = settings.complete(flags.parse(job.argv(tmp_path, 'DATA')))[0].flat()
        if job.name == job.data:
            assert values['stages'] == ('prepare',) and values['data_dir'] == 'DATA'
            assert values['dataset'] == job.name.split('/')[0]
            continue
        found.add(values['model'])
        assert values['seeds'] == ('0', '1')
        assert values['prepared'] == str(tmp_path / 'data' / job.name.split('/')[0])
    # SASRec is there with two other losses; FAME's run trains it with the cross-entropy.
    branched = {name for name in registry.MODELS if name.startswith('branched_')}
    assert found == {*registry.MODELS} - branched - {'bert4rec', 'bsarec', 'tvrec'}
    losses = [flag for job in jobs for flag in job.flags if flag.startswith('--loss=')]
    assert {*losses} == {'--loss=bce', '--loss=sampled'} and len(losses) == 8


def test_a_backbone_is_a_row_of_its_fame():
    for models in ('fame,sasrec', 'branched_fame,branched_sasrec', 'fame_bert4rec,bert4rec'):
        jobs = campaign_jobs.list_jobs(models.split(','), ['toys'], '0')
        assert [job.name for job in jobs] == ['toys/data', f'toys/{models.partition(",")[0]}']


def test_flags_come_from_the_data_sets_file_where_model_and_recipe_let_them():
    jobs = campaign_jobs.list_jobs(['fame', 'core', 'msgifsr'], ['ml-1m-full', 'toys'], '0')
    by_name = {job.name: job for job in jobs}
    fame, core, msgifsr = (by_name[f'ml-1m-full/{m}'] for m in ('fame', 'core', 'msgifsr'))
    assert {'--rows_per_step=32', '--model_options=head_loss=0.3'} < {*fame.flags}
    assert fame.left_out == ()
    assert '--ema=0.998' in core.flags and '--model_options=head_loss=0.3' in core.left_out
    assert registry.find('msgifsr').recipe['rows_per_step'] == 256
    assert '--rows_per_step=32' in msgifsr.left_out and '--ema=0.998' in msgifsr.flags
    assert by_name['toys/core'].flags == ('--model=core', '--seeds=0')


def test_more_flags_win_and_go_to_the_models_that_can_have_them():
    extra = ['--ema=.9', '--finetune_epochs=3', '--k_core=4', '--rows_per_step=16']
    jobs = campaign_jobs.list_jobs(['fame', 'msgifsr'], ['ml-1m-full'], '0', extra)
    data, fame, msgifsr = jobs
    assert data.flags == ('--stages=prepare', '--dataset=ml-1m-full', '--k_core=4')
    assert {'--ema=0.9', '--finetune_epochs=3', '--rows_per_step=16'} < {*fame.flags}
    assert {'--ema=0.9', '--rows_per_step=16'} < {*msgifsr.flags}
    assert '--finetune_epochs=3' in msgifsr.left_out


def test_two_flags_that_need_each_other_are_both_kept():
    _, job = campaign_jobs.list_jobs(['sasrec_sampled'], ['toys'], '0')
    assert {'--loss=sampled', '--num_negatives=256'} < {*job.flags}


def test_a_backbone_is_trained_by_its_fame():
    def names(models, only=''):
        return [job.name for job in campaign_jobs.list_jobs(models, ['toys'], '0', (), only)]

    assert names(['sasrec', 'fame']) == ['toys/data', 'toys/fame']
    assert names(['sasrec', 'core']) == ['toys/data', 'toys/sasrec', 'toys/core']
    assert names(['sasrec', 'fame'], 'sas') == ['toys/data', 'toys/sasrec']


@pytest.mark.parametrize(
    ('argv', 'text'),
    [
        (['--models=fam'], 'did you mean fame?'),
        (['--only=('], 'no regular expression'),
        (['--only=nothing'], 'no job is left'),
        (['--flags=--seed=3'], '--seed is set for each job'),
        (['--flags=--widht=3'], 'did you mean --width?'),
        (['--flags=--finetune_epochs=3', '--models=core'], 'no job can have --finetune_epochs'),
        (["--flags='"], 'No closing quotation'),
        (['--datasets=a/x.csv,b/x.csv'], 'two have the same name'),
        (['--seeds=0,0'], 'has a seed twice'),
        (['--minutes=0'], 'must be above 0'),
        (['--nothing'], 'unrecognized arguments: --nothing'),
        (['--report', 'no/where'], 'no/where/results.json'),
    ],
)
def test_a_mistake_is_one_line(argv, text, capsys):
    assert text in refusal(capsys, *argv)


def test_a_dry_run_prints_commands_and_makes_nothing(tmp_path, capsys):
    out = tmp_path / 'out'
    argv = [f'--out={out}', '--models=core', '--datasets=ml-1m-full,toys', '--dry_run']
    assert campaign.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and not out.exists()
    assert all(line.startswith('python -m fame_jax.main --') for line in lines)
    assert '# without ' in lines[1] and '--model_options=head_loss=0.3' in lines[1]


# The order.


def test_the_least_finished_comes_first_and_a_failed_one_last(tmp_path):
    jobs = make_jobs('a/data', 'a/failed', 'a/finished', 'a/begun', 'b/data', 'b/new', 'a/done')
    for name, seeds, lines in (('a/finished', 1, 0), ('a/begun', 0, 2), ('a/done', 1, 5)):
        folder = tmp_path / 'runs' / name
        for seed in range(2):
            (folder / f'seed_{seed}').mkdir(parents=True)
            (folder / f'seed_{seed}' / 'metrics.jsonl').write_text('{"epoch": 1}\n' * lines)
            if seed < seeds:
                (folder / f'seed_{seed}' / 'results.json').write_text('{}')
    (tmp_path / 'runs' / 'a' / 'done' / 'seeds.json').write_text('{}')
    records = {
        'a/done': {'state': 'done', 'flags': ['--width=8']},
        'a/failed': {'state': 'failed', 'flags': ['--width=8']},
    }
    ordered = [job.name for job in campaign_jobs.order(jobs, tmp_path, records)]
    assert ordered == ['b/data', 'b/new', 'a/data', 'a/begun', 'a/finished', 'a/failed']
    # Other flags are another job.
    records['a/done']['flags'] = ['--width=4']
    assert 'a/done' in [job.name for job in campaign_jobs.order(jobs, tmp_path, records)]


# Workers that are made up.


def test_at_the_deadline_workers_save_and_a_later_call_begins_with_what_is_new(tmp_path):
    jobs = make_jobs('a/sleep1', 'a/sleep2', 'a/later')
    began = time.monotonic()
    one, is_well = run_stub(jobs, tmp_path, seconds=6)
    assert 3 < time.monotonic() - began < 12 and is_well
    assert states(tmp_path) == {'a/sleep1': 'stopped', 'a/sleep2': 'stopped', 'a/later': 'waiting'}
    for name in ('sleep1', 'sleep2'):
        assert (tmp_path / 'runs' / 'a' / name / 'saved').exists()
    assert all(process.poll() is not None for process in one.processes)
    seed = tmp_path / 'runs' / 'a' / 'sleep1' / 'seed_0'
    seed.mkdir()
    (seed / 'metrics.jsonl').write_text('{"epoch": 1}\n')
    run_stub(jobs, tmp_path, seconds=2, workers=1)
    assert states(tmp_path)['a/sleep1'] == 'waiting'
    run_stub(make_jobs('a/later'), tmp_path)
    assert states(tmp_path)['a/later'] == 'done'


def test_a_failed_job_is_reported_by_its_last_line_and_the_others_go_on(tmp_path, capsys):
    jobs = make_jobs('a/data', 'a/fail', 'a/crash', 'a/good')
    _, is_well = run_stub(jobs, tmp_path, workers=1)
    assert not is_well
    assert states(tmp_path) == {
        'a/data': 'done',
        'a/fail': 'failed',
        'a/crash': 'failed',
        'a/good': 'done',
    }
    text = capsys.readouterr().out
    assert re.search(r'a/fail: failed, \d+ s, exit code 2; error: no such thing\n', text)
    assert re.search(r'a/crash: failed, \d+ s, exit code 7; ', text)
    assert '2 done, 2 failed\n' in text
    campaign_results.report([tmp_path], None)
    assert 'a/fail, failed: exit code 2; error: no such thing' in capsys.readouterr().out


def test_jobs_wait_for_their_data_and_without_them_none_begins(tmp_path):
    assert run_stub(make_jobs('a/data', 'a/reads'), tmp_path / 'first')[1]
    one = campaign.Campaign(
        make_jobs('a/data', 'a/x', 'a/y'), tmp_path, command=(sys.executable, '-c', 'exit(3)')
    )
    assert not one.run(20)
    assert set(states(tmp_path).values()) == {'failed'}
    assert one.records['a/y']['line'].startswith('no data: exit code 3')
    assert not (tmp_path / 'runs' / 'a' / 'y.log').exists()


# Packed files.


def make_run(out, name, ranks_U, size=0):
    folder = out / 'runs' / name
    folder.mkdir(parents=True)
    (folder / 'results.json').write_text(json.dumps({'card': 'x' * size}))
    entries = 'popularity/test/masked', 'pretrain/validation/masked', 'pretrain/test/masked'
    np.savez(folder / 'ranks.npz', **dict.fromkeys(entries, ranks_U))


def test_packed_files_keep_the_limits_and_say_what_they_leave_out(tmp_path, capsys):
    draw = np.random.default_rng(0)
    for n in range(6):
        make_run(tmp_path, f'a/m/seed_{n}', draw.integers(1, 2**16, 1000).astype(np.int32), 700)
    (tmp_path / 'ranks_7.npz').write_text('of an earlier call')
    campaign_results.pack(tmp_path, {}, most_bytes=6000, most=5)
    files = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    assert files == ['ranks_0.npz', 'ranks_1.npz', 'ranks_2.npz', 'results.json']
    assert 'left out' not in capsys.readouterr().out
    campaign_results.pack(tmp_path, {}, most_bytes=3500, most=3)
    files = sorted(path for path in tmp_path.iterdir() if path.is_file())
    assert [file.name for file in files] == [*(f'ranks_{n}.npz' for n in range(3)), 'results.json']
    assert all(file.stat().st_size <= 3500 for file in files)
    assert len(json.loads(files[-1].read_text())['runs']) == 4
    # Two runs, and the ranks of the fourth one.
    assert '; 3 in all' in capsys.readouterr().out
    with np.load(files[0]) as file:
        (entry,) = file.files
        assert entry == 'a/m/seed_0/pretrain/test/masked' and file[entry].dtype == np.uint16


def test_a_damaged_run_is_left_out_of_the_packed_files(tmp_path, capsys):
    make_run(tmp_path, 'a/m/seed_0', np.arange(1, 4))
    make_run(tmp_path, 'a/m/seed_1', np.arange(1, 4))
    (tmp_path / 'runs' / 'a' / 'm' / 'seed_0' / 'ranks.npz').write_bytes(b'PK no')
    campaign_results.pack(tmp_path, {})
    assert [*campaign_results.read(tmp_path)['runs']] == ['a/m/seed_1']
    assert 'a/m/seed_0, which is damaged' in capsys.readouterr().out


# A real campaign.


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    """The arguments of a campaign that has run, and its folder."""
    out = tmp_path_factory.mktemp('campaign')
    argv = [f'--out={out}', '--models=fame,last_item', '--datasets=synthetic', '--seeds=0,1']
    argv += [f'--flags={SMALL}', '--minutes=5', '--workers=1']
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
        assert campaign.main(argv) == 0
    return argv, out


def test_the_report_has_the_numbers_of_the_runs(small, tmp_path, capsys):
    _, out = small
    moved = tmp_path / 'packed'
    moved.mkdir()
    for path in out.iterdir():
        if path.is_file():
            shutil.copy(path, moved)
    assert campaign.main(['--report', str(moved), f'--out={tmp_path / "tables"}']) == 0
    page = capsys.readouterr().out
    assert page == (tmp_path / 'tables' / 'tables.md').read_text() and 'Not done' not in page
    (table,) = json.loads((tmp_path / 'tables' / 'tables.json').read_text())['datasets'].values()
    rows = {row['model']: row for row in table['rows']}
    assert {'popularity', 'item_graph', 'sasrec', 'fame', 'last_item'} == {*rows}
    for model, job, stage in (
        ('fame', 'fame', 'finetune'),
        ('sasrec', 'fame', 'pretrain'),
        ('last_item', 'last_item', 'pretrain'),
    ):
        assert rows[model]['seeds'] == [0, 1]
        for part, protocol, metric in (
            ('test', 'masked', 'hr@10'),
            ('test', 'unmasked', 'ndcg@10'),
            ('validation', 'masked', 'ndcg@20'),
            ('shuffled', 'masked', 'ndcg@10'),
        ):
            values = [
                json.loads((out / f'runs/synthetic/{job}/seed_{seed}/results.json').read_text())[
                    'results'
                ][stage][part][protocol][metric]
                for seed in (0, 1)
            ]
            found = rows[model][part][protocol][metric]
            assert found['values'] == values
            assert found['mean'] == np.mean(values) and found['sd'] == np.std(values, ddof=1)
    over = json.loads((out / 'runs/synthetic/fame/seeds.json').read_text())['tests']
    tests = {(t['second'].split(' (')[0], t['protocol'], t['metric']): t for t in table['tests']}
    assert {name for name, *_ in tests} == {'SASRec', 'Last item'}
    for protocol in ('masked', 'unmasked'):
        test = tests['SASRec', protocol, 'ndcg@10']
        assert test['seeds'] == [0, 1] and test['users'] == 60
        assert test['difference'] == pytest.approx(over['test'][protocol]['difference'], abs=1e-12)


def test_the_same_call_again_does_nothing_more(small, capsys):
    argv, out = small
    before = {path: path.stat().st_mtime_ns for path in (out / 'runs').rglob('*')}
    packed = (out / 'results.json').read_text()
    assert campaign.main(argv) == 0
    assert 'nothing is left to do' in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (out / 'runs').rglob('*')} == before
    assert (out / 'results.json').read_text() == packed


def test_a_data_set_that_is_not_there_fails_and_the_exit_code_is_1(tmp_path, capsys):
    argv = [f'--out={tmp_path / "out"}', '--models=core', '--workers=1']
    assert campaign.main([*argv, f'--datasets={tmp_path}/none.csv']) == 1
    assert 'none/data: failed' in capsys.readouterr().out

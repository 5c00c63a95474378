"""experiments/*.sh: the runs that they start; two models for real on a small file."""

import os
import random
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fame_jax.config import flags
from fame_jax.models import registry
from fame_jax.stages import settings

ROOT = Path(__file__).parents[2]
SEEDS = (0, 5)


def script(name, *arguments, **environment):
    return subprocess.run(
        [ROOT / 'experiments' / name, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, 'PYTHON': sys.executable, **environment},
    )


def started_runs(name, out, *arguments, **environment):
    """The flat settings of the runs that a script would start, in order, and its last command."""
    process = script(name, 'DATA', out, *arguments, DRY='1', **environment)
    assert process.returncode == 0, process.stderr
    *runs, last = map(shlex.split, process.stdout.splitlines())
    assert all(run[1:3] == ['-m', 'fame_jax.main'] for run in runs)
    return [settings.complete(flags.parse(run[3:]))[0].flat() for run in runs], last


@pytest.mark.parametrize('name', ['table2.sh', 'sweep.sh'])
def test_a_script_needs_its_folders(name):
    process = script(name)
    assert process.returncode != 0 and 'folder of the data sets' in process.stderr


def test_table2_trains_every_model_with_every_seed(tmp_path):
    runs, last = started_runs('table2.sh', tmp_path, 'toys', ' '.join(map(str, SEEDS)))
    models = [run['model'] for run in runs]
    # FAME's runs train SASRec and BERT4Rec too.
    assert {*models, 'bert4rec'} == set(registry.MODELS)
    assert models.count('sasrec') == 2 * len(SEEDS)
    assert {run['loss'] for run in runs if run['model'] == 'sasrec'} == {'bce', 'sampled'}
    assert {run['seed'] for run in runs} == set(SEEDS)
    assert len({run['workdir'] for run in runs}) == len(runs) == 24 * len(SEEDS)
    assert all(run['data_dir'] == 'DATA' and run['dataset'] == 'toys' for run in runs)
    assert last[1:4] == ['-m', 'fame_jax.report.tables', f'{tmp_path}/toys/*/results.json']
    assert '--against=FAME' in last


def test_a_finished_run_is_skipped_and_extra_flags_go_to_all(tmp_path):
    done = tmp_path / 'toys' / 'core_seed0'
    done.mkdir(parents=True)
    (done / 'results.json').write_text('{}')
    chosen = {'MODELS': 'core fame', 'EXTRA': '--width=32'}
    runs, _ = started_runs('table2.sh', tmp_path, 'toys', '0', **chosen)
    assert [(run['model'], run['width']) for run in runs] == [('fame', 32)]


def test_the_sweep_trains_each_backbone_once_and_before_its_fames(tmp_path):
    grid = {'HEADS': '1 2', 'EXPERTS': '1 4', 'AT_HEADS': '2'}
    runs, _ = started_runs('sweep.sh', tmp_path, 'toys', '0', **grid)
    backbones = {run['workdir']: run['num_heads'] for run in runs[:2]}
    assert [run['model'] for run in runs] == ['sasrec'] * 2 + ['fame'] * 3
    assert list(backbones.values()) == [1, 2]
    fames = [(run['num_heads'], run['num_experts']) for run in runs[2:]]
    assert fames == [(1, 1), (2, 1), (2, 4)]
    for run in runs[2:]:
        assert backbones[run['backbone']] == run['num_heads']
        assert run['stages'] == ('prepare', 'finetune', 'evaluate')


@pytest.mark.slow
def test_a_small_table_is_made_and_a_small_sweep_and_the_same_command_does_nothing_more(tmp_path):
    draw, data = random.Random(0), tmp_path / 'small.txt'
    lines = [f'u{u} ' + ' '.join(f'i{draw.randrange(20)}' for _ in range(9)) for u in range(60)]
    data.write_text('\n'.join(lines) + '\n')
    extra = {'EXTRA': '--width=8 --pretrain_epochs=1 --finetune_epochs=1'}
    table = 'table2.sh', tmp_path, tmp_path / 'runs', data, '0'
    first = script(*table, MODELS='core fame', **extra)
    assert first.returncode == 0, first.stderr
    text = (tmp_path / 'runs' / 'small' / 'tables.md').read_text()
    titles = 'popularity', 'SASRec (', 'CORE (', 'FAME ('
    assert all(f'\n| {title}' in text.replace('**', '') for title in titles)
    assert ' against the others\n' in text and 'CORE (width 8), masked NDCG@10 | 0 |' in text
    again = script(*table, MODELS='core fame', **extra)
    assert again.returncode == 0 and 'pretrain' not in again.stderr
    grid = {'HEADS': '1', 'EXPERTS': '2', 'AT_HEADS': '1', **extra}
    sweep = script('sweep.sh', tmp_path, tmp_path / 'sweep', data, '0', **grid)
    assert sweep.returncode == 0, sweep.stderr
    text = (tmp_path / 'sweep' / 'small' / 'tables.md').read_text()
    assert text.count('| **FAME (H 1, N ') + text.count('| FAME (H 1, N ') == 2 * 2
